"""The examples in the package's docstring and in the README, from beginning to end."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import dive
from dive.cli import CONF, PACKAGE, composed
from dive.eval.perplexity import perplexity
from dive.moe.assemble import assemble
from dive.moe.build import build_layers


def example() -> str:
    """The code of the docstring."""
    assert dive.__doc__ is not None
    return "\n".join(line[4:] for line in dive.__doc__.splitlines() if line.startswith("    "))


def readme() -> str:
    """The code of the README's notebook."""
    text = (
        (PACKAGE.parent / "README.md")
        .read_text(encoding="utf-8")
        .partition("## From a notebook")[2]
        .partition("\n## ")[0]
    )
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


@pytest.mark.slow
def test_the_readmes_examples_run(
    build: Callable[..., PreTrainedModel],
    tokens: Callable[..., Tensor],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    code = readme().replace('"embedded"', '"dense"')
    assert code.count("dive.reconstruct(") == 4
    names = {"tokens": {name: tokens(3, 16, seed=i) for i, name in enumerate("abcdef")}}
    exec(code, names)
    assert names["moe"].config.num_local_experts == 8


def test_a_notebook_builds_what_the_command_line_builds(
    build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor]
) -> None:
    model = build()
    text = {name: tokens(5, 16, seed=i) for i, name in enumerate("abc")}
    short = ["moe.refined.steps=3", "moe.distillation.steps=20"]
    config = composed(["moe.experts=3", "pruning.ratio=0.5", *short])
    together = [torch.cat(list(text.values()))]
    layers = build_layers(
        model, together, config.pruning, config.moe, batch=config.calibration_domains.batch, seed=config.seed
    )
    expected = assemble(model, layers, top_k=config.moe.top_k).state_dict()
    with initialize_config_dir(str(CONF), version_base=None):  # as in a Hydra application
        found = dive.reconstruct(model, text, short, experts=3, ratio=0.5).state_dict()
        assert compose("config").moe.experts == 8  # which goes on
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    begun = dive.reconstruct(model, list(text.values()), short, ratio=0.5).state_dict()  # with a group each
    assert any(not torch.equal(begun[name], tensor) for name, tensor in expected.items())


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
