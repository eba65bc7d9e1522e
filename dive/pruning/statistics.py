"""Statistics of FFN channels: exact, batched, mergeable.

Shapes: L layers, F channels, D hidden width, T tokens, S sampled tokens. The channel activations X of a layer are the
inputs of its ``down_proj``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dive.ranks import Ranks

STRIPS = 8
"""Of rows of a Gram matrix: of so many, 1/2 + 1/(2 · so many) of the square is computed."""


@dataclass(slots=True)
class ChannelStatistics:
    """Moments of X over a set of tokens, for one or more layers.

    Statistics of disjoint sets of tokens add up with ``+`` (or ``sum``) to the statistics of their union: counts and
    second moments add, means and squared deviations merge by Chan et al., "Updating formulae and a pairwise algorithm
    for computing sample variances" (1979).
    """

    count: int
    """Tokens seen."""
    mean: Tensor
    """(L, F) float64"""
    squared_deviations: Tensor
    """(L, F) float64, sum over tokens of (x - mean)²."""
    second_moment: Tensor | None = None
    """(L, F, F) float32, sum over tokens of x xᵀ; needed by least squares."""
    inputs: Tensor | None = None
    """(L, S, D), FFN inputs of some of the tokens, which routers are distilled on."""
    taylor: Tensor | None = None
    """(L, F) float64, sum over sequences of what removing a channel would change the loss by to first order, in nats; see
    :func:`dive.pruning.taylor.taylor_scores`. Needed by the metric of that name."""
    coactivation: Tensor | None = None
    """(L, F, F) float32, tokens on which both channels are among the most active; needed by ``moe=coactivation``."""

    @property
    def variance(self) -> Tensor:
        """(L, F), unbiased."""
        return self.squared_deviations / max(self.count - 1, 1)

    @property
    def mean_square(self) -> Tensor:
        """(L, F), mean of x²."""
        return self.squared_deviations / max(self.count, 1) + self.mean.square()

    def layer(self, number: int) -> "ChannelStatistics":
        """Statistics of one layer, L = 1."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[number : number + 1]

        return ChannelStatistics(
            count=self.count,
            mean=self.mean[number : number + 1],
            squared_deviations=self.squared_deviations[number : number + 1],
            second_moment=pick(self.second_moment),
            inputs=pick(self.inputs),
            taylor=pick(self.taylor),
            coactivation=pick(self.coactivation),
        )

    def of_channels(self, kept: Tensor) -> "ChannelStatistics":
        """Statistics of some channels, by a mask (F,) bool."""
        index = kept.to(self.mean.device).nonzero()[:, 0]

        def square(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:, index][:, :, index]

        return ChannelStatistics(
            count=self.count,
            mean=self.mean[:, index],
            squared_deviations=self.squared_deviations[:, index],
            second_moment=square(self.second_moment),
            inputs=self.inputs,
            taylor=None if self.taylor is None else self.taylor[:, index.to(self.taylor.device)],
            coactivation=square(self.coactivation),
        )

    def __add__(self, other: "ChannelStatistics") -> "ChannelStatistics":
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        delta = other.mean - self.mean
        return ChannelStatistics(
            count=count,
            mean=self.mean + delta * (other.count / count),
            squared_deviations=self.squared_deviations
            + other.squared_deviations
            + delta.square() * (self.count * other.count / count),
            second_moment=_add(self.second_moment, other.second_moment),
            inputs=None
            if self.inputs is None or other.inputs is None
            else torch.cat([self.inputs, other.inputs], dim=1),
            taylor=_add(self.taylor, other.taylor),
            coactivation=_add(self.coactivation, other.coactivation),
        )

    def __radd__(self, other: int) -> "ChannelStatistics":
        if other != 0:
            return NotImplemented
        return self


def nothing(
    channels: int,
    hidden: int,
    device: torch.device,
    *,
    second_moment: bool,
    inputs: bool = False,
    active_channels: int = 0,
) -> ChannelStatistics:
    """Statistics of one layer over no tokens, of the kinds that :func:`batch_statistics` takes."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(1, *shape, dtype=dtype, device=device)

    return ChannelStatistics(
        count=0,
        mean=zeros(channels, dtype=torch.float64),
        squared_deviations=zeros(channels, dtype=torch.float64),
        second_moment=zeros(channels, channels) if second_moment else None,
        inputs=zeros(0, hidden) if inputs else None,
        coactivation=zeros(channels, channels) if active_channels else None,
    )


def over_ranks(statistics: ChannelStatistics, ranks: Ranks, *, owner: int | None = None) -> ChannelStatistics:
    """Statistics of the tokens of all processes, from those of each one's own.

    Args:
        owner: the only process that needs them; all do if none. What the others get means nothing.
    """
    if ranks.count == 1:
        return statistics

    def total(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return ranks.sum(tensor) if owner is None else ranks.sum_at(owner, tensor)

    kept = None if statistics.inputs is None else statistics.inputs[0]
    sizes = torch.zeros(ranks.count, 2, dtype=torch.int64, device=statistics.mean.device)
    sizes[ranks.rank, 0], sizes[ranks.rank, 1] = statistics.count, 0 if kept is None else len(kept)
    counts, inputs = ranks.sum(sizes).T.tolist()
    moments = torch.stack([statistics.mean, statistics.squared_deviations])[None]
    parts = [
        ChannelStatistics(count, *moment)
        for count, moment in zip(counts, ranks.joined(moments, [1] * ranks.count), strict=True)
    ]
    merged: ChannelStatistics = sum(parts[1:], parts[0])
    merged.second_moment, merged.coactivation = total(statistics.second_moment), total(statistics.coactivation)
    merged.inputs = None if kept is None else ranks.joined(kept, inputs)[None]
    return merged


def _add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other


def sampled_rows(count: int, wanted: int, *, seed: int) -> Tensor:
    """Indices of ``wanted`` of ``count`` tokens, in random order; all of them if there are fewer."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted]


def batch_statistics(
    channels: Tensor, *, second_moment: bool, inputs: Tensor | None, active_channels: int = 0
) -> ChannelStatistics:
    """Statistics of one layer over one batch.

    Args:
        channels: X, (T, F).
        second_moment: also x xᵀ, F² numbers.
        inputs: FFN inputs to keep, (S, D), or none.
        active_channels: also count co-activation, F² numbers: a token's active channels are so many of the largest |x|.
    """
    values = channels.float()
    variance, mean = torch.var_mean(values, dim=0, correction=0)
    return ChannelStatistics(
        count=len(values),
        mean=mean.double()[None],
        squared_deviations=variance.double()[None] * len(values),
        second_moment=gram(values)[None] if second_moment else None,
        inputs=None if inputs is None else inputs[None],
        coactivation=_coactivation(values, active_channels)[None] if active_channels else None,
    )


def gram(rows: Tensor) -> Tensor:
    """XᵀX (F, F) of rows X (T, F): what lies above its diagonal, in :data:`STRIPS`, and the mirror image of that."""
    width = rows.shape[1]
    found = rows.new_empty(width, width)
    for start in range(0, width, strip := -(-width // STRIPS)):
        here = slice(start, start + strip)
        torch.mm(rows[:, here].T, rows[:, start:], out=found[here, start:])
        found[start + strip :, here] = found[here, start + strip :].T
    return found


def _coactivation(channels: Tensor, active: int) -> Tensor:
    largest = channels.abs().topk(min(active, channels.shape[1]), dim=1).indices
    marks = torch.zeros_like(channels).scatter_(1, largest, 1.0)
    return marks.T @ marks


def stack_layers(layers: Iterable[ChannelStatistics]) -> ChannelStatistics:
    """Put the statistics of single layers, over the same tokens, on top of each other."""
    parts = list(layers)
    stacked = {}
    for field in fields(ChannelStatistics):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "count":
            stacked[field.name] = values[0]
        else:
            stacked[field.name] = None if values[0] is None else torch.cat(values)
    return ChannelStatistics(**stacked)
