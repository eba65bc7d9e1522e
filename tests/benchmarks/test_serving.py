"""The benchmark of serving: what it counts, and one small run."""

from pathlib import Path

import pytest
from torch import nn
from transformers import LlamaForCausalLM, MixtralForCausalLM

from benchmarks import serving
from benchmarks.serving import EXPERTS, mixtral_config, multiplied
from benchmarks.shapes import llama_config


def test_weights_that_a_token_is_multiplied_by() -> None:
    dense, moe = LlamaForCausalLM(llama_config("tiny")), MixtralForCausalLM(mixtral_config("tiny"))
    linear = sum(module.weight.numel() for module in dense.modules() if isinstance(module, nn.Linear))
    assert multiplied("tiny", sparse=False) == linear
    assert multiplied("tiny", sparse=False, head=False) == linear - dense.lm_head.weight.numel()
    experts = sum(tensor.numel() for name, tensor in moe.named_parameters() if ".experts." in name)
    others = sum(tensor.numel() for name, tensor in moe.named_parameters() if tensor.dim() == 2 and "embed" not in name)
    assert multiplied("tiny", sparse=True) == others + experts // EXPERTS


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rounds", "1", "--prompt", "8", "--batches", "1", "3", "--context", "4", "--steps", "2"]
    serving.main(["--shape", "tiny", *sizes, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "reads 8 tokens" in printed
    assert printed.count(" ×)") == 3
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-dense", "tiny-moe", "request.json"}
