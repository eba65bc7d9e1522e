"""Forward pass of fused experts with low-rank adapters and FLAP's bias, as an experts implementation of transformers.

Shapes: T tokens, K experts a token, S = T · K selected pairs, E experts, D hidden width, W channels of an expert, R rank.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

IMPLEMENTATION = "dive_grouped_mm"
"""Name under which transformers finds :func:`experts_forward`; :mod:`dive.moe.implementation` says when it runs."""

_grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm


def is_aligned(width: int, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product takes rows of ``width`` numbers: they must be multiples of 16 bytes."""
    return width * dtype.itemsize % 16 == 0


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What a product with ``weight`` is computed in: autocast's type where it is on, which grouped products ignore."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each group of rows with its own matrix.

    Args:
        rows: (S, in), sorted by expert.
        weight: (E, out, in).
        offsets: (E,) int32, end of each expert's rows.

    Returns:
        (S, out)
    """
    dtype = compute_dtype(weight)
    rows, transposed = rows.to(dtype), weight.to(dtype).transpose(-2, -1)
    product: Tensor
    if is_aligned(weight.shape[1], dtype) and is_aligned(weight.shape[2], dtype):
        product = _grouped_mm(rows, transposed, offs=offsets)
    else:
        product = torch.ops.transformers.grouped_mm_fallback(rows, transposed, offsets)
    return product


def sort_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of token and expert in the order of experts, for :func:`grouped_linear`.

    Args:
        chosen: (T, K) int64, experts of each token; pairs of experts from ``experts`` on stand behind all others.

    Returns:
        (expert of each row (S,), number t · K + k of each row's pair (S,), end of each expert's rows (E,) int32)
    """
    expert_of_row, order = torch.sort(chosen.reshape(-1), stable=True)
    numbers = torch.arange(experts, device=chosen.device)
    # Not bincount: on CUDA the host waits for it.
    return expert_of_row, order, torch.searchsorted(expert_of_row, numbers, right=True, out_int32=True)


class GroupedLoRA(nn.Module):
    """Low-rank adapters of all experts of one projection: ``scale · B_e A_e dropout(x)`` (LoRA, arXiv 2106.09685).

    Only the rows that an expert was selected for meet its A and B; no expert's delta is ever materialised in training.
    """

    def __init__(
        self,
        like: Tensor,
        experts: int,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.a = nn.Parameter(like.new_empty(experts, rank, in_features))
        self.b = nn.Parameter(like.new_zeros(experts, out_features, rank))
        bound = 1.0 / math.sqrt(in_features)  # kaiming_uniform with a = sqrt(5), as in the paper's implementation
        nn.init.uniform_(self.a, -bound, bound)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """(S, in) sorted by expert to (S, out)."""
        low = grouped_linear(self.dropout(rows), self.a, offsets)
        return grouped_linear(low * self.scale, self.b, offsets)

    def delta(self) -> Tensor:
        """What merging adds to the weights, (E, out, in) float32."""
        return torch.bmm(self.b.float(), self.a.float()) * self.scale


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts of one layer on their selected tokens.

    Args:
        self: the stock experts module, or :class:`dive.moe.indexed.IndexedExperts`; ``lora_gate``, ``lora_up``, ``lora_down``
            and ``down_bias`` are used where present.
        hidden_states: (T, D)
        top_k_index: (T, K) int64
        top_k_weights: (T, K)

    Returns:
        (T, D)
    """
    top_k = top_k_index.shape[-1]
    expert_of_row, order, offsets = sort_by_expert(top_k_index, self.num_experts)
    rows = hidden_states[order // top_k]

    if stores_indices := hasattr(self, "index"):
        gate, up = self.to_channels(rows, offsets)
    else:
        gate, up = grouped_linear(rows, self.gate_up_proj, offsets).chunk(2, dim=-1)
    lora = hasattr(self, "lora_gate")
    if lora:
        gate = gate + self.lora_gate(rows, offsets)
        up = up + self.lora_up(rows, offsets)
    channels = self.act_fn(gate) * up
    output = self.to_hidden(channels, offsets) if stores_indices else grouped_linear(channels, self.down_proj, offsets)
    if lora:
        output = output + self.lora_down(channels, offsets)
    if hasattr(self, "down_bias"):
        output = output + self.down_bias[expert_of_row]

    weighted = output * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    # Back in the order of tokens: a sum of K rows each is deterministic, index_add_ on CUDA is not.
    restored = torch.empty_like(weighted).index_copy_(0, order, weighted)
    return restored.view(-1, top_k, restored.shape[-1]).sum(dim=1).to(hidden_states.dtype)


def register() -> None:
    """Tell transformers about :data:`IMPLEMENTATION`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
