"""The example in the package's docstring, from beginning to end."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import dive
from dive.eval.perplexity import perplexity


def example() -> str:
    """The code of the docstring."""
    assert dive.__doc__ is not None
    return "\n".join(line[4:] for line in dive.__doc__.splitlines() if line.startswith("    "))


def test_the_example_runs(
    build: Callable[..., PreTrainedModel],
    tokens: Callable[..., Tensor],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tmp_path / "dense"
    build().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    monkeypatch.chdir(tmp_path)
    code = example().replace('"embedded"', '"dense"')
    assert "dense" in code
    names = {"dive": dive, "tokens": {name: tokens(3, 16, seed=i) for i, name in enumerate("abcdef")}}
    exec(code, names)
    moe = AutoModelForCausalLM.from_pretrained("moe")
    assert moe.config.num_local_experts == 4
    assert moe.config.intermediate_size == 24
    assert sorted(d for group in names["groups"] for d in group) == list("abcdef")
    assert names["matrix"].shape == (6, 6)
    windows = tokens(2, 16, seed=0)
    assert perplexity(moe, windows) == pytest.approx(perplexity(names["moe"], windows), rel=1e-4)


def test_every_public_name_is_there() -> None:
    for name in dive.__all__:
        assert callable(getattr(dive, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dive.nothing  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, dive; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(dive.__file__).parents[1]).returncode == 0


def test_settings_have_the_same_defaults_everywhere(
    build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor]
) -> None:
    # What is mined is what is built: the same ratio keeps the same channels.
    model = build(intermediate_size=52)
    statistics = dive.collect_statistics(model, {"a": tokens(3, 16)})["a"]
    kept = dive.keep_masks(model, statistics, ratio=0.5)
    moe = dive.reconstruct(model, [statistics], ratio=0.5)
    assert int(kept[0].sum()) == moe.model.layers[0].mlp.experts.down_proj.shape[-1]
    assert torch.isfinite(moe(input_ids=tokens(1, 5)).logits).all()
