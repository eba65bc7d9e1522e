"""One expert a group of domains, pruned on its group's statistics alone (DIVE, arXiv 2506.09351)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dive.config import MoEConfig, PruningConfig
from dive.model.families import FFN
from dive.moe.cut import common_channels, cut_experts
from dive.moe.layer import ExpertLayer
from dive.moe.walk import Group, StatisticsWalk, together
from dive.pruning.metrics import choose_channels
from dive.ranks import ALONE, Ranks

WALK = StatisticsWalk


def layer(
    weights: FFN,
    groups: Sequence[Group],
    pruning: PruningConfig,
    moe: MoEConfig,
    *,
    seed: int,
    ranks: Ranks = ALONE,
) -> ExpertLayer:
    """The experts of one layer; channels that all have are those most important to all text together."""
    assert moe.plain is not None
    width = pruning.width(weights.down.shape[1])
    common = common_channels(moe.plain.shared, width)
    choose = partial(choose_channels, pruning, weights)
    always = None
    if common and len(groups) > 1:
        always = choose(together(groups).statistics, width=common, seed=seed)

    def mask(number: int) -> Tensor:
        return choose(groups[number].statistics, width=width, seed=seed + number, always=always)

    masks = torch.stack(ranks.each(len(groups), mask, torch.zeros(weights.down.shape[1], dtype=torch.bool)))
    return cut_experts(weights, masks, groups, groups, pruning, moe, seed=seed, ranks=ranks)
