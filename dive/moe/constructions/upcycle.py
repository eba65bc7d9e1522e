"""Every expert starts as the same pruned FFN (sparse upcycling, arXiv 2212.05055)."""

from collections.abc import Sequence

from dive.config import MoEConfig, PruningConfig
from dive.model.families import FFN
from dive.moe.cut import cut_experts
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
    """The experts of one layer, pruned on all text together."""
    union = together(groups)
    mask = choose_channels(pruning, weights, union.statistics, width=pruning.width(weights.down.shape[1]), seed=seed)
    masks = mask.expand(moe.experts, -1).clone()
    return cut_experts(weights, masks, [union] * moe.experts, groups, pruning, moe, seed=seed, ranks=ranks)
