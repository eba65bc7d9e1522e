"""The experts of a layer on a CPU, expert after expert, with a backward pass of their own.

Grouped products run one matrix product an expert on a CPU as well, but every step between two of them goes over the rows of
all experts, through memory. Here an expert's rows go through the whole FFN while they are in the cache: gathered, weighted and
added to the result in one go, the adapters added in place, and no gradient copied, or filled with zeros first.

Shapes: T tokens, K experts a token, S = T · K selected pairs, E experts, D hidden width, W channels of an expert, R rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

Adapters = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""A (E, R, in) and B (E, out, R) of gate, of up and of down."""


def run_experts(
    hidden: Tensor,
    chosen: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act: nn.Module,
    *,
    bias: Tensor | None = None,
    adapters: Adapters | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Sum of each token's experts, times their gates.

    Args:
        hidden: (T, D), of one element type with the weights.
        chosen: (T, K) int64, experts of each token.
        gates: (T, K)
        gate_up: (E, 2 W, D)
        down: (E, D, W)
        act: of the gate projection.
        bias: (E, D), added to an expert's output; not trained.
        adapters: of one element type with the weights.
        scale: of the adapters.

    Returns:
        (T, D), of the gates' element type if that is wider.
    """
    experts, order = torch.sort(chosen.reshape(-1), stable=True)
    counts = torch.bincount(experts, minlength=len(down)).tolist()
    output: Tensor = _Experts.apply(
        hidden,
        gates.reshape(-1)[order],
        gate_up,
        down,
        order // chosen.shape[-1],
        counts,
        act,
        bias,
        scale,
        *(adapters or ()),
    )
    return output


def _ranges(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its pairs) of every expert that was selected."""
    found, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found


def _add_product(to: Tensor, one: Tensor, other: Tensor, scale: float = 1.0) -> None:
    """In place; torch's counter of operations does not know ``addmm_``."""
    torch.addmm(to, one, other, alpha=scale, out=to)


def _act_backward(act: nn.Module, inputs: Tensor, gradient: Tensor, out: Tensor) -> None:
    if isinstance(act, nn.SiLU | SiLUActivation):
        torch.ops.aten.silu_backward.grad_input(gradient, inputs, grad_input=out)
        return
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        [found] = torch.autograd.grad(act(leaf), leaf, gradient)
    out.copy_(found)


class _Experts(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        gates: Tensor,
        gate_up: Tensor,
        down: Tensor,
        tokens: Tensor,
        counts: list[int],
        act: nn.Module,
        bias: Tensor | None,
        scale: float,
        *adapters: Tensor,
    ) -> Tensor:
        width, rank = down.shape[2], adapters[0].shape[1] if adapters else 0
        output = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, gates.dtype))
        of_hidden, of_gates, *of_weights = ctx.needs_input_grad
        only_gates = of_gates and not of_hidden and not any(of_weights)
        saved = []  # an expert each: one tensor of all would be too large for the allocator to keep
        for e, pairs in _ranges(counts):
            index = tokens[pairs]
            rows = hidden.index_select(0, index)
            both = rows @ gate_up[e].T
            lows: list[Tensor] = []
            gate, up = both[:, :width], both[:, width:]
            if adapters:
                a_gate, b_gate, a_up, b_up, a_down, b_down = (matrix[e] for matrix in adapters)
                low = rows @ torch.cat([a_gate, a_up]).T
                _add_product(gate, low[:, :rank], b_gate.T, scale)
                _add_product(up, low[:, rank:], b_up.T, scale)
                lows.append(low)
            channels = act(gate).mul_(up)
            made = channels @ down[e].T
            if adapters:
                low = channels @ a_down.T
                _add_product(made, low, b_down.T, scale)
                lows.append(low)
            if bias is not None:
                made += bias[e]
            output.index_add_(0, index, made * gates[pairs, None])
            saved += [made] if only_gates else [*lows, both, channels]
        ctx.save_for_backward(hidden, gates, gate_up, down, tokens, bias, *adapters, *saved)
        ctx.counts, ctx.act, ctx.scale, ctx.adapted, ctx.only_gates = counts, act, scale, bool(adapters), only_gates
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, gates, gate_up, down, tokens, bias, *rest = ctx.saved_tensors
        count = 6 if ctx.adapted else 0
        adapters, saved = rest[:count], iter(rest[count:])
        width, scale = down.shape[2], ctx.scale
        rank = adapters[0].shape[1] if adapters else 0
        wants_hidden, wants_gates, wants_gate_up, wants_down = ctx.needs_input_grad[:4]
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        gates_grad = torch.empty_like(gates) if wants_gates else None
        gate_up_grad = torch.empty_like(gate_up) if wants_gate_up else None
        down_grad = torch.empty_like(down) if wants_down else None
        adapter_grads = [torch.empty_like(matrix) for matrix in adapters]
        for e in (e for e, selected in enumerate(ctx.counts) if not selected):
            for of_weight in (gate_up_grad, down_grad, *adapter_grads):
                if of_weight is not None:
                    of_weight[e].zero_()
        for e, pairs in _ranges(ctx.counts):
            index = tokens[pairs]
            if ctx.only_gates:
                assert gates_grad is not None
                gates_grad[pairs] = (gradient.index_select(0, index) * next(saved)).sum(dim=1)
                continue
            rows = hidden.index_select(0, index)
            low_in, low_out = (next(saved), next(saved)) if adapters else (rows, rows)
            both, channels = next(saved), next(saved)
            outer = gradient.index_select(0, index)
            share = gates[pairs, None]
            if gates_grad is not None and bias is not None:
                gates_grad[pairs] = outer @ bias[e].to(outer.dtype)
            outer = outer.to(down.dtype)
            inner = outer @ down[e]
            if adapters:
                a_gate, b_gate, a_up, b_up, a_down, b_down = (matrix[e] for matrix in adapters)
                low_grad = (outer @ b_down).mul_(scale)
                _add_product(inner, low_grad, a_down)
                low_grad *= share
                torch.mm(low_grad.T, channels, out=adapter_grads[4][e])
            if gates_grad is not None:
                # ⟨gradient, W x⟩ = ⟨Wᵀ gradient, x⟩: the output need not be kept.
                through = (inner * channels).sum(dim=1)
                gates_grad[pairs] = through if bias is None else gates_grad[pairs] + through
            inner *= share
            if down_grad is not None or adapters:
                outer *= share
            if adapters:
                adapter_grads[5][e] = (low_out.T @ outer).T.mul_(scale)
            if down_grad is not None:
                torch.mm(outer.T, channels, out=down_grad[e])
            gate, up = both[:, :width], both[:, width:]
            both_grad = torch.empty_like(both)
            torch.mul(inner, ctx.act(gate), out=both_grad[:, width:])
            _act_backward(ctx.act, gate, inner.mul_(up), out=both_grad[:, :width])
            if adapters:
                of_gate, of_up = both_grad[:, :width], both_grad[:, width:]
                low_grad = torch.cat([of_gate @ b_gate, of_up @ b_up], dim=1).mul_(scale)
                a_grad = low_grad.T @ rows
                adapter_grads[0][e], adapter_grads[2][e] = a_grad[:rank], a_grad[rank:]
                adapter_grads[1][e] = (low_in[:, :rank].T @ of_gate).T.mul_(scale)
                adapter_grads[3][e] = (low_in[:, rank:].T @ of_up).T.mul_(scale)
            if hidden_grad is not None:
                rows_grad = both_grad @ gate_up[e]
                if adapters:
                    _add_product(rows_grad, low_grad, torch.cat([a_gate, a_up]))
                hidden_grad.index_add_(0, index, rows_grad)
            if gate_up_grad is not None:
                torch.mm(both_grad.T, rows, out=gate_up_grad[e])
        return hidden_grad, gates_grad, gate_up_grad, down_grad, None, None, None, None, None, *adapter_grads
