"""The tools that quantise, run where they are installed, and what they wrote made whole."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dive.engines import quantiser
from dive.engines.compare import convert, has_module, run
from dive.engines.compressed import finish
from dive.engines.gguf import CONVERTER
from dive.engines.quantised import Quantised
from dive.engines.schemes import Scheme
from dive.errors import require, shortened
from dive.model.families import twin_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """Where they are, and how they are run."""

    python: str | None
    """Interpreter that has the tool, this one if none."""
    llama_cpp: Path | None
    """llama.cpp's sources."""
    device: str
    """That llm-compressor computes on."""
    seconds: float
    """A tool may take."""


def check_tool(tools: Tools, scheme: Scheme) -> None:
    """Refuse a tool that is not installed, before anything is measured.

    Raises:
        UserError: says how it is installed.
    """
    if tools.python is not None:
        require(
            Path(tools.python).is_file(),
            f"python={tools.python}: no such interpreter; name bin/python of an environment",
        )
    extra = "llama-cpp" if scheme.is_gguf else "quantise"
    require(
        has_module(tools.python, quantiser.MODULES[scheme.tool]),
        f"scheme={scheme.name} needs {scheme.tool.replace('_', '-')}: pip install 'dive-moe[{extra}]', here or in an environment "
        "that python=PYTHON names",
    )
    if scheme.is_gguf:
        require(
            tools.llama_cpp is not None and (tools.llama_cpp / CONVERTER).is_file(),
            f"llama_cpp={tools.llama_cpp}: no {CONVERTER} there; name the directory of llama.cpp's sources",
        )


def with_llm_compressor(
    tools: Tools,
    made: Quantised,
    sequences: list[list[int]],
    model: "PretrainedConfig",
    folder: Path,
    place: Path,
) -> Path:
    """Fill ``place`` with compressed tensors.

    Returns:
        What is loaded.

    Raises:
        UserError: the tool raised an error.
    """
    device = tools.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # bfloat16 is slow on CPUs and rounds GPTQ's updates
    dtype = "float32" if device == "cpu" else str(model.dtype).removeprefix("torch.")
    twin = twin_of(model.model_type)
    written = folder / "written"
    answer = call(
        tools,
        made.tool,
        {
            "source": made.checkpoint,
            "output": str(written),
            "scheme": made.scheme,
            "group": made.group,
            # the head and what decides on routes stay as they are
            "ignore": [twin.head, r"re:.*\.gate$", r"re:.*\.shared_expert_gate$"],
            "sequences": sequences,
            "every": made.every_expert,
            "device": device,
            "dtype": dtype,
        },
        folder,
    )
    made.version, made.reached = answer["version"], answer["reached"]
    finish(written, Path(made.checkpoint), place, answer["quantization"], twin, model.dtype or torch.float32)
    shutil.rmtree(written)
    return place


def with_llama_cpp(tools: Tools, made: Quantised, model: "PretrainedConfig", folder: Path, place: Path) -> Path:
    """Write one GGUF file into ``place``.

    Returns:
        The file.

    Raises:
        UserError: the converter or llama.cpp raised an error.
    """
    exact = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(model.dtype, "f32")
    first = folder / f"model-{exact}.gguf"
    assert tools.llama_cpp is not None
    trouble = convert(tools.llama_cpp, Path(made.checkpoint), first, tools.seconds)
    require(trouble is None, f"scheme={made.scheme}: llama.cpp's converter refuses: {trouble}")
    file = place / f"model-{made.scheme}.gguf"
    request = {"source": str(first), "output": str(file), "scheme": made.scheme}
    made.version = call(tools, made.tool, request, folder)["version"]
    first.unlink()
    return file


def call(tools: Tools, tool: str, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The answer of :mod:`dive.engines.quantiser`, whose progress is shown.

    Raises:
        UserError: the tool raised an error, or took too long.
    """
    asking, answering = folder / "request.json", folder / "answer.json"
    asking.write_text(json.dumps(request), encoding="utf-8")
    command = [tools.python or sys.executable, quantiser.__file__, tool, str(asking), str(answering)]
    trouble = run(command, folder, tools.python, tools.seconds, shown=tool == "llm_compressor")
    answer: dict[str, Any] = json.loads(answering.read_text(encoding="utf-8")) if answering.is_file() else {}
    trouble = answer.get("refused", trouble)
    require(trouble is None, f"scheme={request['scheme']}: {tool.replace('_', '-')} failed ({shortened(str(trouble))})")
    return answer
