"""The examples in the package's docstring and on the page of Python, from beginning to end."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import dive
from dive.calibration_domains.local import read_documents
from dive.cli import CONF, PACKAGE, composed
from dive.errors import UserError
from dive.eval.perplexity import perplexity
from dive.model.load import document_tokens
from dive.moe.assemble import assemble
from dive.moe.build import build_layers
from tests.commands import blocks
from tests.workplace import WORDS, write_domains


def example() -> str:
    """The code of the docstring."""
    assert dive.__doc__ is not None
    return "\n".join(line[4:] for line in dive.__doc__.splitlines() if line.startswith("    "))


def code_of(page: str, heading: str, until: str) -> str:
    """The Python of a page from a heading on, up to a line that begins so."""
    text = (PACKAGE.parent / page).read_text(encoding="utf-8").partition(f"{heading}\n")[2]
    return "\n".join(blocks(text.partition(f"\n{until}")[0], "python"))


@pytest.mark.slow
def test_the_pages_examples_run(
    build: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build(max_position_embeddings=256).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    code = code_of("docs/api.md", "# Python", "::: ").replace('"embedded"', '"dense"')
    assert code.count("dive.reconstruct(") == 4
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["moe"].config.num_local_experts == 8
    assert {matrix.shape[1] for matrix in names["tokens"].values()} == {256}
    assert (tmp_path / "moe/config.json").is_file()


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
    text = {name: tokens(3, 16, seed=i) for i, name in enumerate("abcdef")}
    monkeypatch.setattr(dive, "load_tokens", lambda tokenizer: text, raising=False)
    names: dict[str, Any] = {"dive": dive}
    exec(code, names)
    moe = AutoModelForCausalLM.from_pretrained("moe")
    assert moe.config.num_local_experts == 4
    assert moe.config.intermediate_size == 24
    assert sorted(d for group in names["groups"] for d in group) == list("abcdef")
    assert names["matrix"].shape == (6, 6)
    windows = tokens(2, 16, seed=0)
    assert perplexity(moe, windows) == pytest.approx(perplexity(names["moe"], windows), rel=1e-4)


def test_tokens_are_those_that_a_run_calibrates_on(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_domains(tmp_path / "texts")
    settings = {"samples": 3, "length": 16, "seed": 7}
    found = dive.load_tokens(tokenizer, path=path, **settings)
    assert {name: matrix.shape for name, matrix in found.items()} == dict.fromkeys(WORDS, (3, 16))
    overrides = ["calibration_domains=local", f"calibration_domains.path={path}", "calibration_domains.samples=3"]
    same = dive.load_tokens(tokenizer, [*overrides, "calibration_domains.length=16", "seed=7"])
    assert all(torch.equal(found[name], same[name]) for name in WORDS)
    (cats,) = dive.load_tokens(tokenizer, path=path, domains=["cats"], **settings).values()
    assert torch.equal(cats, found["cats"])
    test = dive.load_tokens(tokenizer, path=path, split="test", **settings)
    assert {name: matrix.shape for name, matrix in test.items()} == dict.fromkeys(WORDS, (3, 16))
    (written,) = (tmp_path / "texts/cats").glob("test.*")
    whole = document_tokens(tokenizer, read_documents(written, field="text", where="cats")[0])
    assert test["cats"].flatten().tolist() == whole[: 3 * 16]
    with pytest.raises(UserError, match=r"split='both': choose one of \['train', 'test'\]"):
        dive.load_tokens(tokenizer, path=path, split="both")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"domain 'cats' has .* tokens of training text"):
        dive.load_tokens(tokenizer, path=path, domains=["cats"], samples=10**6, length=16)


def test_every_public_name_is_there() -> None:
    assert dir(dive) == sorted(dive.__all__)
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
