"""One layer's experts and router, between building them and putting them into a model.

Shapes: T tokens, E experts, K experts a token, D hidden width, F FFN channels of the dense model, W kept channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from dive.config import Gates
from dive.model.families import FFN
from dive.moe.experts import grouped_linear, sort_by_expert

CHUNK = 8192
"""Tokens whose channels are alive at a time."""


@dataclass(slots=True)
class ExpertLayer:
    """One layer's experts and router."""

    masks: Tensor
    """(E, F) bool, true for the channels an expert kept."""
    gate_up: Tensor
    """(E, 2 W, D)"""
    down: Tensor
    """(E, D, W)"""
    router: Tensor
    """(E, D)"""
    bias: Tensor | None = None
    """(E, D), FLAP's compensation."""
    shared_gate_up: Tensor | None = None
    """(2 S, D), of the shared expert, which is of the dense model's own channels."""
    shared_down: Tensor | None = None
    """(D, S)"""

    @property
    def shared(self) -> tuple[Tensor, Tensor] | None:
        """Gate and up, and down, of the shared expert, if there is one."""
        if self.shared_gate_up is None or self.shared_down is None:
            return None
        return self.shared_gate_up, self.shared_down

    @property
    def shared_width(self) -> int:
        """S, 0 if there is none."""
        return 0 if self.shared_down is None else self.shared_down.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """For safetensors."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def expert_function(layer: ExpertLayer, expert: int, act: nn.Module) -> Callable[[Tensor], Tensor]:
    """One expert as a function (T, D) to (T, D)."""
    gate, up = layer.gate_up[expert].chunk(2)
    pruned = FFN(gate, up, layer.down[expert], act)

    def run(inputs: Tensor) -> Tensor:
        output = pruned.channels(inputs) @ pruned.down.T
        return output if layer.bias is None else output + layer.bias[expert]

    return run


def convert(layer: ExpertLayer, dtype: torch.dtype, device: torch.device | None = None) -> ExpertLayer:
    """The layer with its weights in another element type, on another device if one is given."""
    others = {name: tensor.to(device, dtype) for name, tensor in layer.tensors().items() if name != "masks"}
    return ExpertLayer(masks=layer.masks, **others)


def float32(weights: FFN) -> FFN:
    """The FFN in float32."""
    return FFN(weights.gate.float(), weights.up.float(), weights.down.float(), weights.act)


def dense_output(weights: FFN, rows: Tensor) -> Tensor:
    """What the dense FFN makes of rows, (T, D) to (T, D)."""
    return weights.channels(rows) @ weights.down.T


def likeliest_experts(layer: ExpertLayer, inputs: Tensor) -> Tensor:
    """The expert that the router likes best for each of the inputs (T, D); (T,) int64, on the host."""
    router = layer.router.to(inputs.dtype)
    return torch.cat([(part.to(router.device) @ router.T).argmax(dim=-1).cpu() for part in inputs.split(CHUNK)])


def selected_outputs(
    layer: ExpertLayer, act: nn.Module, rows: Tensor, chosen: Tensor, *, own: Tensor | None = None
) -> Tensor:
    """Outputs of each token's chosen experts, (T, K, D), for chosen (T, K) int64.

    Args:
        own: (T, K) bool, the pairs that are computed; all if none. The outputs of others are zero.
    """
    top_k, experts = chosen.shape[1], len(layer.masks)
    # What is not computed stands behind the last expert's rows, where no offset reaches.
    _, order, offsets = sort_by_expert(chosen if own is None else chosen.masked_fill(~own, experts), experts)
    if own is not None:
        order = order[: int(offsets[-1])]
    gate, up = grouped_linear(rows.index_select(0, order // top_k), layer.gate_up, offsets).chunk(2, dim=-1)
    output = grouped_linear(act(gate) * up, layer.down, offsets)
    return output.new_zeros(chosen.numel(), output.shape[1]).index_copy(0, order, output).view(len(rows), top_k, -1)


def pair_errors(
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    act: nn.Module,
    rows: Tensor,
    targets: Tensor,
    *,
    tokens: Tensor,
    experts: Tensor,
) -> Tensor:
    """‖y − expert(x)‖² of pairs of a token and an expert, (S,), expert after expert, while its rows are in the cache.

    Args:
        gate_up: E matrices (2 W, D).
        down: E matrices (D, W).
        rows: x, (T, D).
        targets: y, (T, D).
        tokens: (S,) int64, numbers of rows.
        experts: (S,) int64.
    """
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts, minlength=len(down)).tolist()
    errors = []
    for both, back, index in zip(gate_up, down, tokens[order].split(counts), strict=True):
        # index_select: indexing a matrix by [index] is five times as slow on a CPU
        gate, up = (rows.index_select(0, index) @ both.T).chunk(2, dim=-1)
        errors.append((targets.index_select(0, index) - (act(gate) * up) @ back.T).square().sum(dim=-1))
    return torch.cat(errors)[torch.argsort(order)]


def gates_of(logits: Tensor, kind: Gates, *, top_k: int) -> tuple[Tensor, Tensor]:
    """(gates, experts int64) of the K likeliest experts, each (T, K), likeliest first; from logits (T, E)."""
    highest, chosen = logits.topk(top_k, dim=-1)
    if kind is Gates.renormalised:
        return torch.softmax(highest, dim=-1), chosen
    return torch.softmax(logits, dim=-1).gather(-1, chosen), chosen


def layer_output(
    layer: ExpertLayer, act: nn.Module, rows: Tensor, *, top_k: int, gates: Gates = Gates.renormalised
) -> Tensor:
    """The sparse block as the stock class computes it, of the K likeliest experts; (T, D) to (T, D)."""
    if len(layer.masks) == 1:
        output = expert_function(layer, 0, act)(rows)
    else:
        weights, chosen = gates_of(rows @ layer.router.T, gates, top_k=top_k)
        output = (selected_outputs(layer, act, rows, chosen) * weights[..., None]).sum(dim=1)
    if layer.shared is None:
        return output
    (gate, up), down = layer.shared[0].chunk(2), layer.shared[1]
    return output + dense_output(FFN(gate, up, down, act), rows)
