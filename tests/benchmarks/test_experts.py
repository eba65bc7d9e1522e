"""The blocks that are timed against each other compute the same, and the table has them all."""

import argparse

import pytest
import torch
from torch import Tensor

from benchmarks.experts import STOCK, VARIANTS, build, main, step
from dive.moe import experts as experts_module
from tests.benchmarks.tables import read_table

SETTINGS = argparse.Namespace(
    hidden=16,
    channels=32,
    experts=4,
    tokens=24,
    rank=2,
    dropout=0.0,
    dtype=torch.float32,
    device=torch.device("cpu"),
    seed=0,
)


def gradients(name: str, *, top_k: int, lora: bool) -> dict[str, Tensor]:
    """Of the input and of everything trained, the experts' weights one below the other."""
    experts_module.register()
    block = build(SETTINGS, name, width=8, top_k=top_k, lora=lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # adapters that do something, the same ones in each variant
        if name == "ours" and lora:
            for part in ("gate", "up", "down"):
                adapter = getattr(block.experts, f"lora_{part}")
                for matrix in (adapter.a, adapter.b):
                    matrix.copy_(0.2 * torch.randn(matrix.shape, generator=generator))
        elif lora:
            for part in ("gate", "up", "down"):
                adapters = [getattr(expert, f"{part}_proj").lora for expert in block.experts]
                for matrices in ([a.a for a in adapters], [a.b for a in adapters]):
                    whole = 0.2 * torch.randn(len(matrices), *matrices[0].shape, generator=generator)
                    for matrix, value in zip(matrices, whole, strict=True):
                        matrix.copy_(value)
    hidden, gradient = (torch.randn(1, SETTINGS.tokens, SETTINGS.hidden, generator=generator) for _ in range(2))
    found = {"input": step(block, hidden, gradient), "router": block.gate.weight.grad}
    if name != "loop":
        experts = block.experts
        if lora:
            for part in ("gate", "up", "down"):
                adapter = getattr(experts, f"lora_{part}")
                found |= {f"{part}.a": adapter.a.grad, f"{part}.b": adapter.b.grad}
        else:
            gate, up = experts.gate_up_proj.grad.chunk(2, dim=1)
            found |= {"gate": gate, "up": up, "down": experts.down_proj.grad}
        return found
    for part in ("gate", "up", "down"):
        layers = [getattr(expert, f"{part}_proj") for expert in block.experts]
        if lora:
            found[f"{part}.a"] = torch.stack([layer.lora.a.grad for layer in layers])
            found[f"{part}.b"] = torch.stack([layer.lora.b.grad for layer in layers])
        else:
            found[part] = torch.stack([layer.weight.grad for layer in layers])
    return found


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("name", "lora"), [("loop", False), ("loop", True), *((stock, False) for stock in STOCK)])
def test_what_is_compared_computes_the_same(name: str, lora: bool, top_k: int) -> None:
    ours, theirs = gradients("ours", top_k=top_k, lora=lora), gradients(name, top_k=top_k, lora=lora)
    assert set(ours) == set(theirs)
    for part, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[part], rtol=1e-4, atol=1e-4, msg=lambda m, part=part: f"{part}: {m}"
        )
    assert ours["input"].abs().max() > 0.1


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_dense_ffn_has_the_active_width(top_k: int) -> None:
    dense = build(SETTINGS, "dense", width=8, top_k=top_k, lora=False)
    ours = build(SETTINGS, "ours", width=8, top_k=top_k, lora=False)
    assert dense.down_proj.weight.shape[1] == top_k * ours.experts.down_proj.shape[2]
    adapted = build(SETTINGS, "dense", width=8, top_k=top_k, lora=True)
    assert {n.rpartition(".")[2] for n, p in adapted.named_parameters() if p.requires_grad} == {"a", "b"}


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden", "16", "--channels", "32", "--experts", "4", "--tokens", "24", "--rank", "2", "--rounds", "2"]
    assert main(sizes) == 0
    rows = read_table(capsys.readouterr().out)
    known = [*VARIANTS, "dense", "ours", "loop"]  # with LoRA
    assert [row["block"] for row in rows] == known * 2
    assert [row["width"] for row in rows] == ["16"] * 8 + ["8"] * 8
    assert all(row["/ dense"] == "1.00" for row in rows if row["block"] == "dense")
    assert all(row["loop / it"] == "1.00" for row in rows if row["block"] == "loop")
    assert all(1 <= float(row["busiest expert"]) <= 4 for row in rows if row["block"] == "ours")
