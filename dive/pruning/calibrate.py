"""Collecting channel statistics of a dense model: one pass over the tokens of all domains."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dive.errors import UserError
from dive.model.layers import walk_layers
from dive.progress import track
from dive.pruning.statistics import ChannelStatistics, batch_statistics, stack_layers
from dive.pruning.taylor import taylor_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stream_statistics(
    model: "PreTrainedModel",
    tokens: Mapping[str, Tensor],
    *,
    batch: int = 16,
    second_moments: bool,
    inputs: int = 0,
    taylor: bool = False,
    active_channels: int = 0,
    description: str = "calibrating",
    first_layer: int = 0,
) -> Iterator[list[ChannelStatistics]]:
    """Yield, layer after layer, the statistics (L = 1) of each set of tokens; one layer's are alive at a time.

    Args:
        model: dense model.
        tokens: {name: (N, T) int64}; a name stands for a domain, or for a group of domains.
        batch: sequences per forward pass.
        second_moments: also F × F second moments.
        inputs: FFN inputs to keep for each name, evenly spread over its tokens.
        taylor: also Taylor scores, by a pass with gradients of its own before the first layer's statistics.
        active_channels: also count co-activation of so many channels a token, F × F.
        first_layer: the one to begin with; the tokens merely pass through those before it.
    """
    names = list(tokens)
    batches, owner, keep = [], [], []
    for position, name in enumerate(names):
        matrix = tokens[name]
        if matrix.ndim != 2 or matrix.dtype != torch.int64 or matrix.numel() == 0:
            raise UserError(
                f"tokens of {name!r} must be a non-empty (samples, length) int64 matrix, not {tuple(matrix.shape)} {matrix.dtype}"
            )
        stride = max(matrix.numel() // inputs, 1) if inputs else 0
        for start in range(0, len(matrix), batch):
            rows = matrix[start : start + batch]
            first = start * matrix.shape[1]
            batches.append(rows)
            owner.append(position)
            # The same tokens are sampled however they are batched.
            keep.append(torch.arange(-first % stride, rows.numel(), stride) if inputs else None)

    salience = taylor_scores(model, tokens, batch=batch) if taylor else None
    layers = int(model.config.num_hidden_layers)
    steps = iter(track(range(layers * len(batches)), description))
    for number, run in walk_layers(model, batches):
        merged = [ChannelStatistics(0, torch.empty(0), torch.empty(0)) for _ in names]
        for seen in run():
            if number < first_layer:
                next(steps)
                continue
            chosen = keep[seen.index]
            merged[owner[seen.index]] += batch_statistics(
                seen.channels,
                second_moment=second_moments,
                inputs=None if chosen is None else seen.inputs[chosen.to(seen.inputs.device)],
                active_channels=active_channels,
            )
            next(steps)
        if number < first_layer:
            continue
        if salience is not None:
            for name, statistics in zip(names, merged, strict=True):
                statistics.taylor = salience[name][number : number + 1]
        yield merged
    next(steps, None)


def collect_statistics(
    model: "PreTrainedModel",
    tokens: Mapping[str, Tensor],
    *,
    batch: int = 16,
    second_moments: bool = True,
    inputs: int = 2048,
    taylor: bool = False,
    active_channels: int = 0,
) -> dict[str, ChannelStatistics]:
    """Statistics of every domain over all layers, in one forward pass.

    With second moments they take domains × layers × F² × 4 bytes of host memory; without, domains × layers × F × 16.

    Args:
        model: dense model, see :func:`dive.load_dense`.
        tokens: {domain: (N, L) int64}, N sequences of L tokens.
        batch: sequences per forward pass.
        second_moments: needed by ``compensation="least_squares"``.
        inputs: FFN inputs kept per domain and layer, for ``router_init="distilled"``.
        taylor: needed by ``metric="taylor"``; one more pass, forward and backward.
        active_channels: channels counted as active on a token, for ``construction=coactivation``; 0 counts none.

    Raises:
        UserError: a domain's tokens are not a non-empty int64 matrix.
    """
    by_layer: Sequence[list[ChannelStatistics]] = [
        [_to_host(statistics) for statistics in layer]
        for layer in stream_statistics(
            model,
            tokens,
            batch=batch,
            second_moments=second_moments,
            inputs=inputs,
            taylor=taylor,
            active_channels=active_channels,
        )
    ]
    return {name: stack_layers(layer[i] for layer in by_layer) for i, name in enumerate(tokens)}


def _to_host(statistics: ChannelStatistics) -> ChannelStatistics:
    def host(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cpu()

    return ChannelStatistics(
        count=statistics.count,
        mean=statistics.mean.cpu(),
        squared_deviations=statistics.squared_deviations.cpu(),
        second_moment=host(statistics.second_moment),
        inputs=host(statistics.inputs),
        taylor=host(statistics.taylor),
        coactivation=host(statistics.coactivation),
    )
