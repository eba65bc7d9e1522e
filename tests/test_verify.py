"""``python -m dive.verify``: transformers alone, and interpreters that only seem to have another engine."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import dive
from dive.errors import UserError
from dive.verify import Engine, PythonsConfig, VerifyConfig, verify
from tests.conftest import Build
from tests.engines.pretended import interpreter
from tests.workplace import Workplace, environment

ALONE = [Engine.transformers]


@pytest.fixture(scope="module")
def original(
    build: Build, tokens: Any, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    statistics = dive.collect_statistics(build("llama-tied"), {"a": tokens(2, 16), "b": tokens(2, 16, seed=1)})
    moe = dive.reconstruct(build("llama-tied"), list(statistics.values()), ratio=0.5, router_init="random")
    return dive.save(moe, tokenizer, tmp_path_factory.mktemp("verify") / "checkpoint")


@pytest.fixture
def export(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def asked(export: Path, **settings: Any) -> dict[str, Any]:
    """``verify.json``, whatever the verdict."""
    sizes = {"tokens": 200, "continuations": 2, "max_new_tokens": 3}
    try:
        verify(VerifyConfig(checkpoint=str(export), **(sizes | settings)))
    finally:
        found: dict[str, Any] = json.loads((export.parent / "verify.json").read_text())
    return found


def test_without_a_run_transformers_is_the_reference(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(export, engines=[Engine.transformers, Engine.vllm, Engine.sglang])
    (truth, *others) = found["engines"]
    assert (truth["verdict"], truth["equal"], found["continuations"], found["tokens"]) == ("reference", 2, 2, 3)
    assert found["predicted"] == 3 * 62  # 200 tokens are three windows of one less than all 64 positions
    assert truth["perplexity"] > 1
    assert [each["verdict"] for each in others] == ["not installed", "not installed"]
    out = capsys.readouterr().out
    assert "vllm: not installed; pip install vllm" in out
    assert "pythons.sglang=PYTHON names an interpreter" in out
    assert not list(export.parent.glob(".verify-*"))


def test_prompts_of_ones_own(export: Path) -> None:
    found = asked(export, engines=ALONE, prompts=["the cat sat", "12 + 30"])
    assert (found["texts"], found["continuations"]) == ("2 prompts", 2)
    with pytest.raises(UserError, match=r"^prompts: '' has fewer than two tokens"):
        asked(export, engines=ALONE, prompts=[""])
    with pytest.raises(UserError, match=r"exceed the model's 64 positions; shorten it or lower max_new_tokens"):
        asked(export, engines=ALONE, prompts=["the cat " * 60])


def test_a_directory_that_does_not_load_whole(export: Path) -> None:
    file = export / "model.safetensors"
    stored = load_file(file)
    save_file({**stored, "model.layers.0.spare": stored["lm_head.weight"].clone()}, file, metadata={"format": "pt"})
    (export.parent / "verify.json").write_text("{}")
    with pytest.raises(UserError, match=r"^checkpoint=.*spare"):
        asked(export, engines=ALONE)


def test_an_engine_that_differs(export: Path, tmp_path: Path) -> None:
    code = (
        "question = json.load(open(asked[2]))\n"
        "logprobs = [[-1.0] * (len(text) - 1) for text in question['texts']]\n"
        "continuations = [[0] * question['tokens'] for _ in question['prompts']]\n"
        "json.dump({'version': '1', 'logprobs': logprobs, 'continuations': continuations}, open(asked[3], 'w'))\n"
    )
    pythons = PythonsConfig(vllm=interpreter(tmp_path, code))
    with pytest.raises(
        UserError, match=r"^vllm 1 differs: text \d+, token \d+ is [\d.]+ nats off; other continuations$"
    ):
        asked(export, engines=[Engine.vllm], pythons=pythons)
    found = json.loads((tmp_path / "verify.json").read_text())
    assert [each["verdict"] for each in found["engines"]] == ["reference", "differs"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "embedded"}, "checkpoint=embedded: no directory of an export"),
        ({"pythons": PythonsConfig(vllm="/no/python")}, r"pythons\.vllm=/no/python: no such interpreter"),
        ({"llama_cpp": "/nowhere"}, r"llama_cpp=/nowhere: no convert_hf_to_gguf\.py in this directory"),
    ],
)
def test_what_is_not_there_is_said_at_once(export: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        verify(VerifyConfig(**({"checkpoint": str(export)} | settings)))


def test_no_engine_is_nothing_to_do() -> None:
    with pytest.raises(UserError, match=r"^engines is empty; set engines=\[transformers,vllm,llama_cpp,sglang\]$"):
        VerifyConfig(checkpoint="x", engines=[])


def test_the_texts_and_the_figure_of_the_run_beside_it(untrained: Workplace) -> None:
    untrained.run("verified", "retrain=none")
    directory = untrained.root / "verified"
    found = asked(directory / "checkpoint", engines=ALONE, tokens=4096)
    (row,) = found["engines"]
    measured = json.loads((directory / "results.json").read_text())["stages"][-1]["perplexity"]["mean"]
    assert found["texts"].startswith("the run's test texts (")
    assert (row["verdict"], row["perplexity"]) == (
        "equal",
        pytest.approx(measured, rel=1e-4),
    )  # all of what it measured

    file = directory / "checkpoint" / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.1.block_sparse_moe.experts.0.w2.weight"].mul_(-1)
    save_file(stored, file, metadata={"format": "pt"})
    line = [sys.executable, "-m", "dive.verify", f"checkpoint={directory / 'checkpoint'}", "engines=[transformers]"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "differs: the run measured a perplexity of" in said
    assert json.loads((directory / "verify.json").read_text())["engines"][0]["verdict"] == "differs"
