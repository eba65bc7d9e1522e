"""The backward pass of experts on a CPU against numeric derivatives, and its forward pass against what it stands for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import SiLUActivation

from dive.moe.cpu_experts import run_experts

TOKENS, HIDDEN, WIDTH, EXPERTS, RANK, SCALE = 5, 3, 4, 4, 2, 1.5


def inputs(top_k: int, *, adapted: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(experts of each token (T, K), bias (E, D), [hidden, gates, gate_up, down, adapters ...]); the last expert is unused."""
    generator = torch.Generator().manual_seed(top_k)
    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:top_k] for _ in range(TOKENS)])
    shapes = [(TOKENS, HIDDEN), (TOKENS, top_k), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)]
    if adapted:
        for inside, outside in ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)):
            shapes += [(EXPERTS, RANK, inside), (EXPERTS, outside, RANK)]
    tensors = [torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes]
    return chosen, torch.randn(EXPERTS, HIDDEN, dtype=torch.float64, generator=generator), tensors


def run(chosen: Tensor, bias: Tensor | None, act: nn.Module, *tensors: Tensor) -> Tensor:
    hidden, gates, gate_up, down, *adapters = tensors
    adapted: Any = tuple(adapters) or None
    return run_experts(hidden, chosen, gates, gate_up, down, act, bias=bias, adapters=adapted, scale=SCALE)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("act", [SiLUActivation(), nn.GELU()], ids=["silu", "gelu"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_are_the_numeric_derivatives(top_k: int, act: nn.Module, biased: bool, adapted: bool) -> None:
    chosen, bias, tensors = inputs(top_k, adapted=adapted)
    assert torch.autograd.gradcheck(lambda *t: run(chosen, bias if biased else None, act, *t), tensors)


@pytest.mark.parametrize("frozen", range(4))
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen: int) -> None:
    chosen, bias, tensors = inputs(2, adapted=True)
    run(chosen, bias, nn.SiLU(), *tensors).square().sum().backward()
    expected = [tensor.grad for tensor in tensors]
    again = [t.detach().clone().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
    run(chosen, bias, nn.SiLU(), *again).square().sum().backward()
    for number, (tensor, gradient) in enumerate(zip(again, expected, strict=True)):
        assert (tensor.grad is None) == (number == frozen)
        assert tensor.grad is None or gradient is None or torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_router_alone_takes_no_matrix_product_backwards(adapted: bool) -> None:
    chosen, bias, tensors = inputs(2, adapted=adapted)
    run(chosen, bias, nn.SiLU(), *tensors).square().sum().backward()
    alone = [t.detach().clone().requires_grad_(i == 1) for i, t in enumerate(tensors)]
    output = run(chosen, bias, nn.SiLU(), *alone)
    with FlopCounterMode(display=False) as counter:
        output.square().sum().backward()
    assert counter.get_total_flops() == 0
    torch.testing.assert_close(alone[1].grad, tensors[1].grad)


def test_token_by_token() -> None:
    chosen, bias, tensors = inputs(2, adapted=True)
    hidden, gates, gate_up, down, a_gate, b_gate, a_up, b_up, a_down, b_down = tensors
    wanted = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for t in range(TOKENS):
        for k, e in enumerate(chosen[t].tolist()):
            gate = (gate_up[e, :WIDTH] + SCALE * b_gate[e] @ a_gate[e]) @ hidden[t]
            up = (gate_up[e, WIDTH:] + SCALE * b_up[e] @ a_up[e]) @ hidden[t]
            channels = gate * torch.sigmoid(gate) * up
            made = (down[e] + SCALE * b_down[e] @ a_down[e]) @ channels + bias[e]
            wanted[t] += gates[t, k] * made
    torch.testing.assert_close(run(chosen, bias, nn.SiLU(), *tensors), wanted)


def test_gates_of_a_wider_type_keep_it() -> None:
    chosen, _, tensors = inputs(2, adapted=False)
    hidden, gates, gate_up, down = (t.detach().to(torch.bfloat16).requires_grad_() for t in tensors)
    output = run_experts(hidden, chosen, gates.float(), gate_up, down, nn.SiLU())
    assert output.dtype == torch.float32
    output.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.bfloat16 for t in (hidden, gates, gate_up, down))
