"""What a tool wrote becomes a checkpoint that engines read, and is read as the numbers that it stands for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dive.engines.compressed import finish, on_disk
from dive.engines.worker import decompressed, loaded, trouble
from dive.errors import UserError
from dive.model.families import twin_of
from tests.engines.exports import make

INT8: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "format": "int-quantized",
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        }
    },
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("mixtral, tied head", tmp_path_factory.mktemp("compressed") / "checkpoint")


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(8-bit integers, scale of each row (W, 1)) of a matrix (W, D), by hand."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round().clamp(-128, 127).to(torch.int8), scale


def written(export: Path, directory: Path) -> Path:
    """Experts in 8 bits under the names that the tool gives them, without the tied head."""
    (file,) = export.glob("*.safetensors")
    in_memory = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    tensors = {}
    for name, tensor in load_file(file).items():
        if ".experts." in name:
            module, projection, _ = name.rsplit(".", 2)
            quantised, scale = rounded(tensor)
            place = f"{module}.{in_memory[projection]}"
            tensors |= {f"{place}.weight": quantised, f"{place}.weight_scale": scale}
        elif name != "lm_head.weight":
            tensors[name] = tensor
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def quantised(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantised")
    tool = written(export, directory / "tool")
    finish(tool, export, directory / "checkpoint", INT8, twin_of("mixtral"), torch.bfloat16)
    return directory / "checkpoint"


def test_names_are_those_of_the_class_on_disk() -> None:
    name = "model.layers.3.block_sparse_moe.experts.7.down_proj.weight_packed"
    assert on_disk(name, twin_of("mixtral")) == "model.layers.3.block_sparse_moe.experts.7.w2.weight_packed"
    other = "model.layers.3.mlp.experts.7.down_proj.weight_packed"
    assert on_disk(other, twin_of("qwen3_moe")) == other
    attention = "model.layers.3.self_attn.q_proj.weight_scale"
    assert on_disk(attention, twin_of("mixtral")) == attention


def test_the_directory_is_the_export_with_other_weights(export: Path, quantised: Path) -> None:
    config = json.loads((export / "config.json").read_text())
    assert json.loads((quantised / "config.json").read_text()) == config | {"quantization_config": INT8}
    names = {file.name for file in export.iterdir()} - {"README.md"}
    assert {file.name for file in quantised.iterdir()} == names
    assert (quantised / "tokenizer.json").read_bytes() == (export / "tokenizer.json").read_bytes()
    before, after = load_file(export / "model.safetensors"), load_file(quantised / "model.safetensors")
    assert {name for name in after if not name.endswith("_scale")} == before.keys()
    assert after["model.layers.0.block_sparse_moe.experts.1.w2.weight"].dtype is torch.int8
    assert after["model.layers.0.block_sparse_moe.experts.1.w2.weight_scale"].dtype is torch.float32
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"].bfloat16())  # tied, and left out by the tool
    with safe_open(quantised / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_it_is_read_as_what_the_integers_stand_for(export: Path, quantised: Path, tmp_path: Path) -> None:
    found = loaded(decompressed(quantised, tmp_path)).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(export, dtype=torch.bfloat16).float().state_dict()
    stored = load_file(export / "model.safetensors")
    for layer in (0, 1):
        for expert in range(4):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            gate, down, up = (
                integers.float() * scale
                for integers, scale in (rounded(stored[f"{name}.w{n}.weight"]) for n in (1, 2, 3))
            )
            block = f"model.layers.{layer}.mlp.experts"
            expected[f"{block}.gate_up_proj"][expert] = torch.cat([gate, up])
            expected[f"{block}.down_proj"][expert] = down
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_plain_checkpoint_is_read_as_it_is(export: Path, tmp_path: Path) -> None:
    assert decompressed(export, tmp_path) == export


def test_what_transformers_makes_of_it_is_said(export: Path, quantised: Path) -> None:
    text = [5, 9, 200, 31, 7, 4000]
    with torch.no_grad():
        logits = loaded(export)(input_ids=torch.tensor([text])).logits[0, :-1].double().log_softmax(-1)
    logprobs = logits.gather(1, torch.tensor(text[1:])[:, None])[:, 0].tolist()
    assert trouble(str(export), text, logprobs) is None
    off = trouble(str(export), text, [each - 1 for each in logprobs])
    assert off == "it loads, and answers otherwise: +1 nats a token"
    refused = trouble(str(quantised), text, logprobs)
    assert refused is not None  # transformers 5.24 takes experts in 8-bit integers to be packed
    assert refused.startswith("RuntimeError: ")


def test_a_tensor_that_the_tool_left_out(export: Path, tmp_path: Path) -> None:
    tool = written(export, tmp_path / "tool")
    tensors = load_file(tool / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.gate.weight"]
    save_file(tensors, tool / "model.safetensors")
    with pytest.raises(
        UserError, match=r"left out 1 tensors \(first: model\.layers\.1\.block_sparse_moe\.gate\.weight\)"
    ):
        finish(tool, export, tmp_path / "checkpoint", INT8, twin_of("mixtral"), torch.float32)
