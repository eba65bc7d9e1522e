"""A directory of compressed tensors as engines read it: stock names, the export's own configuration and tokenizer.

llm-compressor (0.14.0.1) names the experts of every class as transformers does in memory. Mixtral's are ``w1``, ``w2`` and
``w3`` on disk: under other names transformers initialises them anew without raising an error, and vLLM does not find them.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive.errors import UserError
from dive.model.families.twin import Twin
from dive.model.headers import INDEX, read_headers
from dive.store import write_json

if TYPE_CHECKING:
    import torch

SCALES = ("weight_scale", "weight_zero_point", "weight_global_scale")
"""Suffixes of what keeps its precision."""


def finish(
    written: Path, export: Path, output: Path, quantization: Mapping[str, Any], twin: Twin, dtype: "torch.dtype"
) -> None:
    """Fill ``output`` with weights of what the tool wrote, and all else of the export.

    Args:
        written: directory of the tool.
        export: what it was made of. Its head is copied where the tool left it out as tied: SGLang ties none.
        quantization: what config.json says of it.
        dtype: of what is not quantised, scales aside.

    Raises:
        UserError: a tensor of the export is neither there nor quantised.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    output.mkdir(parents=True, exist_ok=True)
    for file in export.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in (INDEX, "config.json", "README.md"):
            shutil.copy2(file, output)
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    write_json(output / "config.json", config | {"quantization_config": dict(quantization)})
    stored = read_headers(sorted(export.glob("*.safetensors")), f"checkpoint={export}")
    embeddings, head = f"{twin.embeddings}.weight", f"{twin.head}.weight"
    places: dict[str, str] = {}
    total = 0
    for file in sorted(written.glob("*.safetensors")):
        tensors = {on_disk(name, twin): tensor for name, tensor in load_file(file).items()}
        if embeddings in tensors and head in stored and head not in tensors:
            with safe_open(stored[head].file, framework="pt") as opened:
                tensors[head] = opened.get_tensor(head)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.element_size() > 1 and name.rpartition(".")[2] not in SCALES:
                tensors[name] = tensor.to(dtype)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output / file.name, {"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(places.values())) > 1:
        write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    lost = [name for name in stored if name not in places and f"{name}_packed" not in places]
    if lost:
        raise UserError(
            f"the tool left out {len(lost)} tensors (first: {min(lost)}); install the release that docs/serving.md names"
        )


def on_disk(name: str, twin: Twin) -> str:
    """Name of a tensor as the class has it on disk; the tool calls an expert's projections as those of a dense FFN."""
    if ".experts." not in name:
        return name
    module, projection, suffix = name.rsplit(".", 2)
    named = dict(zip(twin.projections, twin.experts_on_disk, strict=True))
    return f"{module}.{named.get(projection, projection)}.{suffix}"
