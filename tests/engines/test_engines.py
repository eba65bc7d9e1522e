"""Exports of every kind in the engines, where those are: DIVE_ENGINES names what ``tests/engines/install`` filled."""

import importlib.util
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dive.engines.gguf import CONVERTER
from dive.engines.verified import DIFFERS, EQUAL, LOADS, REFUSED
from dive.engines.worker import MODULES
from dive.errors import UserError
from dive.verify import Engine, PythonsConfig, VerifyConfig, verify
from tests.engines.exports import KINDS, make

OTHERS = ("vllm", "llama_cpp", "sglang")
EXPECTED = {
    "mixtral, tied head": (EQUAL, EQUAL, LOADS),
    "mixtral, wide heads, Llama-3 RoPE scaling": (EQUAL, EQUAL, DIFFERS),
    "mixtral, Llama-3 RoPE scaling": (EQUAL, EQUAL, DIFFERS),
    "mixtral, untied": (EQUAL, EQUAL, LOADS),
    "qwen3_moe, tied head, wide heads": (EQUAL, EQUAL, LOADS),
    "qwen3_moe, probabilities": (EQUAL, DIFFERS, LOADS),
    "qwen2_moe from Qwen2": (EQUAL, DIFFERS, LOADS),
    "qwen2_moe from Qwen2, probabilities": (EQUAL, EQUAL, LOADS),
    "qwen2_moe from Llama, probabilities, Llama-3 RoPE scaling": (EQUAL, DIFFERS, LOADS),
    "qwen2_moe from Llama, probabilities, wide heads": (DIFFERS, REFUSED, DIFFERS),
}
"""{kind: verdict on each of the others}, as docs/serving.md says it."""

pytestmark = pytest.mark.slow


def place() -> Path:
    return Path(os.environ.get("DIVE_ENGINES", "unset")).resolve()


def python(engine: str) -> str | None:
    """The interpreter that has an engine, where it is not this one."""
    file = place() / engine / "bin/python"
    return str(file) if file.is_file() else None


def lacking(engine: str) -> str | None:
    """Why an engine is not asked."""
    if python(engine) is None and importlib.util.find_spec(MODULES[engine][0]) is None:
        return f"no {engine}: tests/engines/install DIR, and DIVE_ENGINES=DIR"
    if engine == "llama_cpp" and not (place() / "llama.cpp" / CONVERTER).is_file():
        return "no llama.cpp in DIVE_ENGINES"
    if engine == "llama_cpp" and importlib.util.find_spec("sentencepiece") is None:
        return "no sentencepiece, which llama.cpp's converter imports"
    return None


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, dict[str, Any]]]:
    """``verdicts(kind)``: {engine: what it made of the export}, of every engine that is there, asked once."""

    @cache
    def ask(kind: str) -> dict[str, dict[str, Any]]:
        directory = tmp_path_factory.mktemp("engines")
        found = [engine for engine in OTHERS if lacking(engine) is None]
        config = VerifyConfig(
            checkpoint=str(make(kind, directory / "checkpoint")),
            engines=[Engine.transformers, *(Engine[engine] for engine in found)],
            pythons=PythonsConfig(**{engine: python(engine) for engine in found}),
            llama_cpp=str(place() / "llama.cpp") if "llama_cpp" in found else None,
            tokens=2048,
        )
        with suppress(UserError):  # some are expected to differ
            verify(config)
        rows = json.loads((directory / "verify.json").read_text())["engines"]
        return {row["engine"]: row for row in rows}

    return ask


@pytest.mark.parametrize("engine", OTHERS)
@pytest.mark.parametrize("kind", EXPECTED)
def test_an_engine_gives_what_is_said_of_it(
    kind: str, engine: str, verdicts: Callable[[str], dict[str, dict[str, Any]]]
) -> None:
    reason = lacking(engine)
    if reason is not None:
        pytest.skip(reason)
    row = verdicts(kind)[engine]
    assert row["verdict"] == EXPECTED[kind][OTHERS.index(engine)], row.get("reason")
    if row["verdict"] == EQUAL:
        assert row["difference"] < 1e-4
        assert row["equal"] == 8


def test_every_kind_is_expected() -> None:
    assert EXPECTED.keys() == KINDS.keys()
