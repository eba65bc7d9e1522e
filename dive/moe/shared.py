"""A shared expert, and the others built of the channels that it leaves.

The most important channels of a dense FFN stand beside the experts as they are. What is left of the FFN is itself one of fewer
channels, from which every construction builds experts as it would from a whole one.

Shapes: T tokens, E experts, D hidden width, F FFN channels, S channels of the shared expert.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dive.config import MoEConfig, PruningConfig
from dive.model.families import FFN
from dive.moe.layer import CHUNK, ExpertLayer, dense_output, float32
from dive.moe.walk import Group, LayerTokens, together
from dive.pruning.metrics import importance, keep_highest
from dive.pruning.statistics import ChannelStatistics, batch_statistics, nothing, over_ranks, sampled_rows
from dive.ranks import ALONE, Ranks

SAMPLED = 32768
"""Tokens from which channels are scored where the tokens themselves are shown."""


def beside_shared(
    construction: Any,
    weights: FFN,
    shown: Sequence[Group] | LayerTokens,
    pruning: PruningConfig,
    moe: MoEConfig,
    *,
    seed: int,
    ranks: Ranks = ALONE,
) -> ExpertLayer:
    """The experts of one layer beside a shared one, which has the channels most important to all text together.

    Args:
        construction: module of the construction.
        weights: of the dense FFN.
        shown: what the construction's walk shows of the layer.
        seed: of this layer.
        ranks: the processes that compute together.

    Raises:
        UserError: the statistics lack what the metric needs, or the settings leave an expert nothing.
    """
    channels = weights.down.shape[1]
    width, count = moe.widths(pruning, channels)
    scores = importance(pruning.score_metric, weights, _statistics(weights, shown, seed=seed), seed=seed)
    common = keep_highest(scores, count)
    shared, rest = _of_channels(weights, common), _of_channels(weights, ~common)
    narrower = replace(pruning, ratio=1.0 - width / (channels - count))
    layer: ExpertLayer = construction.layer(
        rest, _without(shown, shared, common), narrower, moe, seed=seed, ranks=ranks
    )
    masks = torch.zeros(len(layer.masks), channels, dtype=torch.bool)
    masks[:, ~common] = layer.masks.cpu()
    gate_up = torch.cat([shared.gate, shared.up])
    return replace(layer, masks=masks, shared_gate_up=gate_up, shared_down=shared.down)


def _of_channels(weights: FFN, kept: Tensor) -> FFN:
    index = kept.nonzero()[:, 0].to(weights.down.device)
    return FFN(weights.gate[index], weights.up[index], weights.down[:, index], weights.act)


def _statistics(weights: FFN, shown: Sequence[Group] | LayerTokens, *, seed: int) -> ChannelStatistics:
    """Of all text together, what channels are scored by."""
    if not isinstance(shown, LayerTokens):
        return together(shown).statistics
    whole, found = float32(weights), ChannelStatistics(0, torch.empty(0), torch.empty(0))
    for rows in shown.share.own(sampled_rows(shown.share.count, SAMPLED, seed=seed)).split(CHUNK):
        inputs = shown.inputs.index_select(0, rows).to(weights.down.device)
        found += batch_statistics(whole.channels(inputs), second_moment=False, inputs=None)
    if not found.count:
        hidden, channels = weights.down.shape
        found = nothing(channels, hidden, weights.down.device, second_moment=False)
    return over_ranks(found, shown.share.ranks)


def _without(shown: Sequence[Group] | LayerTokens, shared: FFN, common: Tensor) -> Sequence[Group] | LayerTokens:
    """What is shown, of an FFN without the shared channels."""
    if not isinstance(shown, LayerTokens):
        return [
            Group(
                group.statistics.of_channels(~common),
                None if group.held_out is None else group.held_out.of_channels(~common),
            )
            for group in shown
        ]
    whole, targets = float32(shared), torch.empty_like(shown.targets)
    for rows, wanted, left in zip(
        shown.inputs.split(CHUNK), shown.targets.split(CHUNK), targets.split(CHUNK), strict=True
    ):
        left.copy_(wanted - dense_output(whole, rows.to(shared.down.device)).to(wanted))
    return replace(shown, targets=targets)
