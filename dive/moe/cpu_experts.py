"""Gated FFNs of all experts on a CPU, expert after expert, with a backward pass of their own.

Grouped products run one matrix product an expert on a CPU as well, but every step between two of them goes over the rows of
all experts, through memory. Here an expert's rows go through the whole FFN while they are in the cache, adapters are added in
place, and no gradient is copied or filled with zeros first.

Shapes: S rows sorted by expert, E experts, D hidden width, W channels of an expert, R rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers.activations import SiLUActivation

Adapters = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""A (E, R, in) and B (E, out, R) of gate, of up and of down."""


def gated_ffns(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    per_expert: Tensor,
    act: nn.Module,
    adapters: Adapters | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Apply each expert's FFN, with its low-rank adapters, to its rows.

    Args:
        rows: (S, D), sorted by expert.
        gate_up: (E, 2 W, D)
        down: (E, D, W)
        per_expert: (E,), rows of each expert.
        act: of the gate.
        adapters: of one element type with the weights.
        scale: of the adapters.

    Returns:
        (S, D)
    """
    output: Tensor = _GatedFFNs.apply(rows, gate_up, down, per_expert.tolist(), act, scale, *(adapters or ()))
    return output


def _ranges(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows."""
    found, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found


def _act_backward(act: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensor:
    if isinstance(act, nn.SiLU | SiLUActivation):
        return torch.ops.aten.silu_backward(gradient, inputs)
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        [found] = torch.autograd.grad(act(leaf), leaf, gradient)
    return found


class _GatedFFNs(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        gate_up: Tensor,
        down: Tensor,
        counts: list[int],
        act: nn.Module,
        scale: float,
        *adapters: Tensor,
    ) -> Tensor:
        width, rank = down.shape[2], adapters[0].shape[1] if adapters else 0
        both = rows.new_empty(len(rows), 2 * width)
        channels = rows.new_empty(len(rows), width)
        low = rows.new_empty(len(rows), 3 * rank)
        output = torch.empty_like(rows)
        for e, part in _ranges(counts):
            gate, up = both[part, :width], both[part, width:]
            torch.mm(rows[part], gate_up[e].T, out=both[part])
            if adapters:
                a_gate, b_gate, a_up, b_up, a_down, b_down = (matrix[e] for matrix in adapters)
                low[part, : 2 * rank] = rows[part] @ torch.cat([a_gate, a_up]).T
                gate.addmm_(low[part, :rank], b_gate.T, alpha=scale)
                up.addmm_(low[part, rank : 2 * rank], b_up.T, alpha=scale)
            torch.mul(act(gate), up, out=channels[part])
            torch.mm(channels[part], down[e].T, out=output[part])
            if adapters:
                low[part, 2 * rank :] = channels[part] @ a_down.T
                output[part].addmm_(low[part, 2 * rank :], b_down.T, alpha=scale)
        ctx.save_for_backward(rows, gate_up, down, both, channels, low, *adapters)
        ctx.counts, ctx.act, ctx.scale = counts, act, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        [gradient] = gradients
        rows, gate_up, down, both, channels, low, *adapters = ctx.saved_tensors
        width, rank, scale = down.shape[2], low.shape[1] // 3, ctx.scale
        wants_rows, wants_gate_up, wants_down = ctx.needs_input_grad[:3]
        rows_grad = torch.empty_like(rows) if wants_rows else None
        weights = [
            torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted else None
            for weight, wanted in ((gate_up, wants_gate_up), (down, wants_down))
        ]
        gate_up_grad, down_grad = weights
        adapter_grads = [torch.empty_like(matrix) for matrix in adapters]
        for e, count in enumerate(ctx.counts):
            if not count:
                for gradient_of in (*weights, *adapter_grads):
                    if gradient_of is not None:
                        gradient_of[e].zero_()
        for e, part in _ranges(ctx.counts):
            outer = gradient[part]
            inner = outer @ down[e]
            if adapters:
                a_gate, b_gate, a_up, b_up, a_down, b_down = (matrix[e] for matrix in adapters)
                low_grad = (outer @ b_down).mul_(scale)
                inner.addmm_(low_grad, a_down)
                torch.mm(low_grad.T, channels[part], out=adapter_grads[4][e])
                adapter_grads[5][e] = (low[part, 2 * rank :].T @ outer).T.mul_(scale)
            if down_grad is not None:
                torch.mm(outer.T, channels[part], out=down_grad[e])
            gate, up = both[part, :width], both[part, width:]
            both_grad = torch.empty_like(both[part])
            torch.mul(inner, ctx.act(gate), out=both_grad[:, width:])
            both_grad[:, :width] = _act_backward(ctx.act, gate, inner.mul_(up))
            if rows_grad is not None:
                torch.mm(both_grad, gate_up[e], out=rows_grad[part])
            if adapters:
                low_grad = torch.cat([both_grad[:, :width] @ b_gate, both_grad[:, width:] @ b_up], dim=1).mul_(scale)
                a_grad = low_grad.T @ rows[part]
                adapter_grads[0][e], adapter_grads[2][e] = a_grad[:rank], a_grad[rank:]
                adapter_grads[1][e] = (low[part, :rank].T @ both_grad[:, :width]).T.mul_(scale)
                adapter_grads[3][e] = (low[part, rank : 2 * rank].T @ both_grad[:, width:]).T.mul_(scale)
                if rows_grad is not None:
                    rows_grad[part].addmm_(low_grad, torch.cat([a_gate, a_up]))
            if gate_up_grad is not None:
                torch.mm(both_grad.T, rows[part], out=gate_up_grad[e])
        return rows_grad, gate_up_grad, down_grad, None, None, None, *adapter_grads
