"""An export as GGUF: llama.cpp reads the same tokens and gives the same perplexity.

Needs llama-cpp-python, sentencepiece, and llama.cpp's sources in the directory that LLAMA_CPP_SOURCE names.
"""

import os
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from benchmarks.gguf_perplexity import TOLERANCE, main, pre_tokenizer
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


@pytest.mark.slow
def test_llama_cpp_gives_the_same_perplexity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("llama_cpp", "sentencepiece"):
        pytest.importorskip(package)
    source = Path(os.environ.get("LLAMA_CPP_SOURCE", "unset"))
    if not (source / "convert_hf_to_gguf.py").is_file():
        pytest.skip("LLAMA_CPP_SOURCE names no directory of llama.cpp's sources")
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = ["--llama-cpp", str(source), "--output", str(tmp_path), "--quantise", "q8_0", "q4_k_m"]
    assert main(options) == 0  # within TOLERANCE, every document in the same tokens
    assert TOLERANCE == 0.01
    out = capsys.readouterr().out
    assert out.count("0 of ") == 3
    assert "Q4_K" in out
    sizes = [(tmp_path / f"model-{kind}.gguf").stat().st_size for kind in ("f16", "q8_0", "q4_k_m")]
    assert sizes == sorted(sizes, reverse=True)
