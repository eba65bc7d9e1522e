"""Verdicts on what engines answer."""

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from dive.engines.compare import Asked, ask, judge, judge_mean, lacks, perplexity, reference, run, same, turned
from dive.engines.texts import Question
from dive.engines.verified import DIFFERS, EQUAL, LOADS, NEAR, REFERENCE, REFUSED
from tests.engines.pretended import interpreter

TRUTH: dict[str, Any] = {
    "version": "5",
    "logprobs": [[-1.0, -2.0], [-3.0]],
    "continuations": [[5, 6, 7], [8, 9, 9]],
    "margins": [[1.0, 1e-4, 1.0], [2.0, 2.0, 2.0]],
    "frequencies": [1.0, 0.1],
}


def answer(**changed: Any) -> dict[str, Any]:
    return copy.deepcopy(TRUTH) | {"version": "1"} | changed


def test_perplexity_is_over_all_tokens() -> None:
    assert perplexity([[-1.0, -2.0], [-3.0]]) == pytest.approx(math.exp(2.0))


def test_the_same_is_equal() -> None:
    found = judge("vllm", answer(logprobs=[[-1.0, -2.0005], [-3.0]]), TRUTH, 1e-3)
    assert (found.verdict, found.version, found.equal, found.reason) == (EQUAL, "1", 2, None)
    assert found.difference == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"logprobs": [[-1.0, -2.1], [-3.0]]}, "text 1, token 3 is 0.1 nats off"),
        ({"logprobs": [[-1.0, -2.0], [math.nan]]}, "text 2, token 2 is nan nats off"),
        ({"continuations": [[5, 6, 7], [8, 9, 4]]}, "other continuations"),
    ],
)
def test_what_is_off_differs(changed: dict[str, Any], reason: str) -> None:
    found = judge("vllm", answer(**changed), TRUTH, 1e-3)
    assert (found.verdict, found.reason) == (DIFFERS, reason)


def test_a_continuation_may_go_another_way_where_two_tokens_were_equally_likely() -> None:
    tokens, margins = TRUTH["continuations"][0], TRUTH["margins"][0]
    assert same([5, 1, 2], tokens, margins, tie=2e-3)
    assert not same([5, 1, 2], tokens, margins, tie=1e-5)
    assert not same([1, 6, 7], tokens, margins, tie=2e-3)


def test_an_error_of_the_engine_is_a_refusal() -> None:
    found = judge("vllm", {"version": "1", "refused": "ValueError: no\n such class"}, TRUTH, 1e-3)
    assert (found.verdict, found.reason) == (REFUSED, "ValueError: no such class")


def test_a_loader_alone() -> None:
    found = judge("sglang", {"faults": [], "frequencies": [1.0, 0.1]}, TRUTH, 1e-3)
    assert (found.verdict, found.difference) == (LOADS, None)
    found = judge("sglang", {"faults": ["lm_head.weight is never written"], "frequencies": [1.0, 0.1]}, TRUTH, 1e-3)
    assert (found.verdict, found.reason) == (DIFFERS, "lm_head.weight is never written")
    assert turned([1.0, 0.1], None) == []
    assert turned([1.0], [1.0, 0.1]) == ["heads are 2 wide, not 4"]
    assert "RoPE scaling" in turned([1.0, 0.0125], [1.0, 0.1])[0]


@pytest.mark.parametrize(("off", "verdict", "said"), [(0.02, NEAR, "+2.0e-02"), (-0.04, DIFFERS, "-4.0e-02")])
def test_a_quantised_export_is_judged_by_its_perplexity(off: float, verdict: str, said: str) -> None:
    other = answer(logprobs=[[-1.0 - 9 - off, -2.0 + 9 - off], [-3.0 - off]])  # single tokens are far off
    found = judge("vllm", other, TRUTH, 1e-3)
    judge_mean(found, perplexity(TRUTH["logprobs"]))
    assert (found.verdict, found.reason) == (verdict, f"{said} nats a token in the mean")


@pytest.mark.parametrize(("measured", "verdict"), [(None, REFERENCE), (math.exp(2.0), EQUAL), (8.0, DIFFERS)])
def test_transformers_is_held_to_what_the_run_measured(measured: float | None, verdict: str) -> None:
    found = reference(TRUTH, measured, 1e-3)
    assert found.verdict == verdict
    assert (found.reason is not None) is (verdict == DIFFERS)


def asked(directory: Path, **settings: Any) -> Asked:
    """How engines are asked of a checkpoint that none of them opens."""
    return Asked(checkpoint=directory / "checkpoint", **({"pythons": {}, "llama_cpp": None, "seconds": 60} | settings))


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("print('no such class'); sys.exit(3)", "ended with code 3, having said: no such class"),
        ("json.dump({'version': '1', 'refused': 'ValueError: heads'}, open(asked[3], 'w'))", "ValueError: heads"),
    ],
)
def test_an_engine_that_ends_takes_nothing_with_it(tmp_path: Path, code: str, refused: str) -> None:
    question = Question(source="text", texts=[[1, 2]], prompts=[[1]], tokens=1)
    answer, _ = ask(asked(tmp_path, pythons={"vllm": interpreter(tmp_path, code)}), "vllm", question)
    assert answer["refused"] == refused
    assert [file.name for file in tmp_path.iterdir()] == ["python"]


def test_an_engine_that_takes_too_long(tmp_path: Path) -> None:
    said = run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, None, 0.6)
    assert said == "it took more than 0.01 minutes; set minutes=0.02"


def test_what_is_to_be_installed(tmp_path: Path) -> None:
    assert lacks(asked(tmp_path), "transformers") is None
    said = lacks(asked(tmp_path), "sglang")
    assert said == "pip install sglang, or pythons.sglang=PYTHON names an interpreter that has it"
    there = {engine: interpreter(tmp_path, "") for engine in ("vllm", "llama_cpp")}
    assert lacks(asked(tmp_path, pythons=there), "vllm") is None
    assert "llama_cpp=DIR names llama.cpp's sources" in str(lacks(asked(tmp_path, pythons=there), "llama_cpp"))
