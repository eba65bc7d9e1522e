"""Experts of one layer as index sets into the dense FFN (``retrain.storage=indexed``).

Until something trains them, gate and up of every expert are rows of the dense model's, and without a refit its down
projection is columns of the dense one's. Each layer puts its experts together when it runs, and again in the backward
pass, so that one layer's are in memory at a time.

Shapes: E experts, D hidden width, F FFN channels of the dense model, W kept channels, S selected pairs of token and expert.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dive.errors import UserError
from dive.model.families import FFN
from dive.moe.experts import experts_forward, grouped_linear
from dive.moe.layer import ExpertLayer


class GatheredLinear(torch.autograd.Function):
    """Multiply each group of rows with rows of one frozen matrix; saves the matrix, not what was gathered of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, index: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
        """
        Args:
            rows: (S, in), sorted by expert.
            matrix: (F, D), frozen.
            index: (E, W) int64, the rows of ``matrix`` that each expert has.
            offsets: (E,) int32, end of each expert's rows.
            transposed: from W to D, as a down projection does; else from D to W.

        Returns:
            (S, W), or (S, D) if transposed.
        """
        ctx.save_for_backward(matrix, index, offsets)
        ctx.transposed, ctx.dtype = transposed, rows.dtype
        weight = matrix[index]
        return grouped_linear(rows, weight.transpose(1, 2) if transposed else weight, offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        matrix, index, offsets = ctx.saved_tensors
        (gradient,) = gradients
        weight = matrix[index].to(gradient.dtype)
        back = grouped_linear(gradient, weight if ctx.transposed else weight.transpose(1, 2), offsets)
        return back.to(ctx.dtype), None, None, None, None


class IndexedExperts(nn.Module):
    """Takes the place of a stock experts module, with the dense FFN's own tensors."""

    def __init__(self, dense: FFN, layer: ExpertLayer) -> None:
        """
        Raises:
            UserError: the experts' gate and up projections are not the dense model's.
        """
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = layer.down.shape
        self.act_fn = dense.act
        device = dense.gate.device
        index = torch.stack([mask.nonzero().squeeze(1) for mask in layer.masks]).to(device)
        self.register_buffer("index", index, persistent=False)
        self.gate, self.up = _frozen(dense.gate), _frozen(dense.up)
        gate, up = layer.gate_up.to(device).chunk(2, dim=1)
        if not (torch.equal(gate, dense.gate[index]) and torch.equal(up, dense.up[index])):
            raise UserError(
                "retrain.storage=indexed: gate and up of these experts are not the dense model's; set "
                "retrain.storage=materialised"
            )
        down = layer.down.to(device)
        if torch.equal(down, dense.down.T[index].transpose(1, 2)):
            self.down = _frozen(dense.down)
        else:
            self.down_proj = _frozen(down)
        if layer.bias is not None:
            self.down_bias = _frozen(layer.bias.to(down))

    def to_channels(self, rows: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up projections: (S, D) to two of (S, W)."""
        gate: Tensor = GatheredLinear.apply(rows, self.gate, self.index, offsets, False)
        up: Tensor = GatheredLinear.apply(rows, self.up, self.index, offsets, False)
        return gate, up

    def to_hidden(self, channels: Tensor, offsets: Tensor) -> Tensor:
        """Down projection: (S, W) to (S, D)."""
        if hasattr(self, "down_proj"):
            return grouped_linear(channels, self.down_proj, offsets)
        output: Tensor = GatheredLinear.apply(channels, self.down.T, self.index, offsets, True)
        return output

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D) to (T, D); see :func:`dive.moe.experts.experts_forward`."""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
