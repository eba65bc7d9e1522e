"""Importance of FFN channels, and the masks that follow from it.

Shapes: D hidden width, F channels, L layers.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dive.config import Metric, PruningConfig
from dive.errors import UserError
from dive.model.families import FFN, decoder_layers, ffn
from dive.pruning.elimination import eliminate
from dive.pruning.statistics import ChannelStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


OBS_RIDGE = 1e-3
"""Ridge of elimination where none is given: its order hardly depends on it."""


def importance(metric: Metric, weights: FFN, statistics: ChannelStatistics, *, seed: int = 0) -> Tensor:
    """Score of each channel of one layer, (F,) float64; the lowest go first.

    With X the input of ``down_proj`` and W its weight:

    - ``wifv``: Var(X_j) · Σ_d W[d, j]² (FLAP, arXiv 2312.11983, eq. 5)
    - ``ifv``: Var(X_j)
    - ``wifn``: mean_d |W[d, j]| · sqrt(mean X_j²) (Wanda, arXiv 2306.11695, averaged over outputs)
    - ``taylor``: Σ |x_j · ∂loss/∂x_j| and the like of gate and up (LLM-Pruner, arXiv 2305.11627, vector-wise); see
      :func:`dive.pruning.taylor.taylor_scores`
    - ``magnitude``: norm of the channel's weights in gate, up and down together; needs no text
    - ``random``: uniform, seeded

    Args:
        statistics: of one layer (L = 1).
        seed: ``random`` only.

    Raises:
        UserError: the statistics lack what the metric needs.
    """
    down = weights.down.double()
    if metric is Metric.taylor:
        if statistics.taylor is None:
            raise UserError("pruning.metric=taylor needs Taylor scores: collect_statistics(..., taylor=True)")
        return statistics.taylor[0].to(down.device)
    if metric is Metric.wifv:
        return statistics.variance[0].to(down.device) * down.square().sum(dim=0)
    if metric is Metric.ifv:
        return statistics.variance[0].to(down.device)
    if metric is Metric.wifn:
        return down.abs().mean(dim=0) * statistics.mean_square[0].to(down.device).sqrt()
    if metric is Metric.obs:
        raise ValueError("obs removes channels one after another: see choose_channels")
    if metric is Metric.magnitude:
        gate, up = weights.gate.double(), weights.up.double()
        return (gate.square().sum(dim=1) + up.square().sum(dim=1) + down.square().sum(dim=0)).sqrt()
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(down.shape[1], generator=generator, dtype=torch.float64).to(down.device)


def keep_highest(scores: Tensor, width: int) -> Tensor:
    """Mask (F,) bool of the ``width`` highest scores; ties go to the lower index, so that the same text gives the same mask."""
    order = torch.argsort(scores, descending=True, stable=True)
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    mask[order[:width].cpu()] = True
    return mask


def choose_channels(
    pruning: PruningConfig,
    weights: FFN,
    statistics: ChannelStatistics,
    *,
    width: int,
    ridge: float | None = None,
    cross: Tensor | None = None,
    always: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Channels of one layer that stay, (F,) bool: the highest scores, or what elimination leaves.

    Args:
        statistics: of one layer (L = 1), with its second moment for ``metric=obs``.
        width: how many stay.
        ridge: ``metric=obs`` only; ``pruning.ridge`` if none, :data:`OBS_RIDGE` where that is to be chosen.
        cross: ``metric=obs`` only: see :func:`dive.pruning.elimination.eliminate`.
        always: (F,) bool, channels that stay whatever their score.
        seed: ``metric=random`` only.

    Raises:
        UserError: the statistics lack what the metric needs.
    """
    if pruning.metric is not Metric.obs:
        scores = importance(pruning.metric, weights, statistics, seed=seed)
        if always is not None:
            scores = scores.masked_fill(always.to(scores.device), torch.inf)
        return keep_highest(scores, width)
    if statistics.second_moment is None:
        raise UserError("pruning.metric=obs needs second moments: collect_statistics(..., second_moments=True)")
    if ridge is None:
        ridge = OBS_RIDGE if pruning.ridge is None else pruning.ridge
    return eliminate(
        weights.down,
        statistics.second_moment[0],
        width,
        ridge=ridge,
        block=pruning.obs_block,
        cross=cross,
        always=always,
    )


def keep_masks(
    model: "PreTrainedModel",
    statistics: ChannelStatistics,
    *,
    metric: Metric | str = Metric.wifv,
    ratio: float = 0.5,
    width_multiple: int = 8,
    seed: int = 0,
) -> Tensor:
    """Channels that stay in each layer when ``ratio`` of them go, (L, F) bool; the same number in every layer.

    Args:
        model: dense model.
        statistics: of all its layers.
        metric: any; ``obs`` needs statistics with second moments.
        width_multiple: the kept width is rounded to this multiple, as by :func:`dive.reconstruct`.
        seed: ``metric="random"`` only.

    Raises:
        UserError: the ratio is outside (0, 1), or the multiple leaves nothing.
    """
    metric = Metric(metric)
    pruning = PruningConfig(metric=metric, ratio=ratio, width_multiple=width_multiple)
    masks = []
    for number in range(len(decoder_layers(model))):
        weights = ffn(model, number)
        width = pruning.width(weights.down.shape[1])
        found = statistics.layer(number)
        masks.append(choose_channels(pruning, weights, found, width=width, ridge=OBS_RIDGE, seed=seed + number))
    return torch.stack(masks)


def importance_of_layers(
    model: "PreTrainedModel", statistics: ChannelStatistics, metric: Metric, *, seed: int = 0
) -> Tensor:
    """:func:`importance` of every layer's channels, (L, F) float64."""
    layers = range(len(decoder_layers(model)))
    return torch.stack([importance(metric, ffn(model, n), statistics.layer(n), seed=seed + n) for n in layers])
