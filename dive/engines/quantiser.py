"""One tool that quantises an export: ``python quantiser.py TOOL REQUEST ANSWER``, two files of JSON.

It is run as a script, by the interpreter that has the tool, and needs that tool and the standard library alone.

The request has ``source`` (a directory; for llama.cpp a GGUF file), ``output`` (the same), and ``scheme``; for llm-compressor
also ``group`` (columns that share a scale; null where a row does), ``ignore`` (names of what stays as it is), ``sequences``
(token ids, none where nothing is calibrated), ``every`` (whether every expert sees every token), ``device`` and ``dtype``. The
answer has ``version``, for llm-compressor ``quantization`` (what config.json says of it) and ``reached`` ({layer: tokens that
the router sent to each expert}); and ``refused`` where the tool raised an error.
"""

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTIONS = {"llm_compressor": "llmcompressor", "llama_cpp": "llama-cpp-python"}
"""{tool: what pip calls it}"""
MODULES = {"llm_compressor": "llmcompressor", "llama_cpp": "llama_cpp"}
"""{tool: its module}"""
PRESETS = {"fp8": "FP8_DYNAMIC", "int8": "W8A8", "w8a16": "W8A16", "w4a16": "W4A16"}
"""{scheme: llm-compressor's name of it}"""


def with_llm_compressor(request: dict[str, Any]) -> dict[str, Any]:
    """Weights in the compressed-tensors format, layer by layer; GPTQ where there are sequences to calibrate on."""
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    import torch
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(
            request["source"], dtype=getattr(torch, request["dtype"]), local_files_only=True
        )
    model.to(request["device"])
    kind = GPTQModifier if request["sequences"] else QuantizationModifier
    scheme = preset_name_to_scheme(PRESETS[request["scheme"]], ["Linear"])
    if scheme.weights.strategy == "group":
        grouped = {"strategy": "group" if request["group"] else "channel", "group_size": request["group"]}
        scheme.weights = QuantizationArgs(**scheme.weights.model_dump() | grouped)
    recipe = kind(config_groups={"group_0": scheme}, ignore=request["ignore"])
    if not request["sequences"]:
        oneshot(model=model, recipe=recipe, pipeline="datafree")
        reached = {}
    else:
        rows: Any = [{"input_ids": torch.tensor([row])} for row in request["sequences"]]
        with counted(model, sum(map(len, request["sequences"]))) as reached:
            oneshot(
                model=model,
                recipe=recipe,
                dataset=DataLoader(rows, batch_size=None),
                num_calibration_samples=len(rows),
                moe_calibrate_all_experts=request["every"],
                pipeline="sequential",
            )
    model.save_pretrained(request["output"], save_compressed=True, max_shard_size="4GB")
    config = json.loads((Path(request["output"]) / "config.json").read_text(encoding="utf-8"))
    return {"quantization": config["quantization_config"], "reached": reached}


@contextmanager
def counted(model: Any, tokens: int) -> Iterator[dict[str, list[int]]]:
    """{layer: tokens that its router sends to each expert}, filled while the model runs.

    Args:
        tokens: after which a layer counts no more: it is calibrated on them, and then run on them again for the next layer.
    """
    from llmcompressor.modeling.moe.linear_experts import LinearExperts2D

    found: dict[str, list[int]] = {}

    def count(name: str, module: Any) -> Any:
        found[name] = [0] * module.num_experts

        def hook(module: Any, arguments: Any, options: Any) -> None:
            index = options.get("top_k_index", arguments[1] if len(arguments) > 1 else None)  # (T, K)
            if sum(found[name]) < tokens * index.shape[1]:
                for expert, sent in enumerate(index.flatten().bincount(minlength=module.num_experts).tolist()):
                    found[name][expert] += sent

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    hooks = [count(name, module) for name, module in model.named_modules() if isinstance(module, LinearExperts2D)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def with_llama_cpp(request: dict[str, Any]) -> dict[str, Any]:
    """A GGUF file of another element type."""
    quantise_gguf(request["source"], request["output"], request["scheme"])
    return {}


def quantise_gguf(source: str, output: str, scheme: str) -> None:
    """Write a GGUF file anew in another element type.

    Args:
        scheme: as llama.cpp calls it, in small letters: ``q4_k_m``.

    Raises:
        RuntimeError: llama.cpp refuses; it prints why.
    """
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{scheme.upper()}")
    if llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not quantise {source}")


TOOLS = {"llm_compressor": with_llm_compressor, "llama_cpp": with_llama_cpp}


def main(tool: str, request: str, answer: str) -> None:
    """Run the tool and write what came of it, whatever that is."""
    found: dict[str, Any] = {"version": metadata.version(DISTRIBUTIONS[tool])}
    Path(answer).write_text(json.dumps(found | {"refused": "it ended without a word"}), encoding="utf-8")
    try:
        found |= TOOLS[tool](json.loads(Path(request).read_text(encoding="utf-8")))
    except BaseException as error:  # whatever a tool raises is its answer
        found["refused"] = f"{type(error).__name__}: {error}"
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # our gguf.py would stand before the package of that name
    main(*sys.argv[1:])
