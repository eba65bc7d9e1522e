"""What llama.cpp's converter cannot tell of a tokenizer by itself."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from dive.engines.gguf import pre_tokenizer
from dive.model.architecture import EMBEDDED

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


@pytest.mark.parametrize(
    ("before", "normalizer", "name"),
    [
        (BYTES, None, "gpt-2"),
        (pre_tokenizers.Sequence([DIGITS, BYTES]), None, "starcoder"),
        (pre_tokenizers.Sequence([BYTES, DIGITS]), None, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None, None),
        (BYTES, normalizers.Lowercase(), None),
        (None, None, None),
    ],
)
def test_the_name_of_a_pre_tokenizer(before: object, normalizer: object, name: str | None, tmp_path: Path) -> None:
    core = Tokenizer(models.BPE())
    if before is not None:
        core.pre_tokenizer = before
    if normalizer is not None:
        core.normalizer = normalizer
    core.save(str(tmp_path / "tokenizer.json"))
    assert pre_tokenizer(tmp_path) == name


def test_the_embedded_tokenizer_has_a_name() -> None:
    assert pre_tokenizer(EMBEDDED) == "gpt-2"
