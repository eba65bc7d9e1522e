"""Experts of channels that fire together (MoEfication, arXiv 2110.01786; CMoE, arXiv 2502.04416).

Shapes: F channels, E experts, n channels to divide.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dive.config import MoEConfig, PruningConfig
from dive.errors import UserError
from dive.model.families import FFN
from dive.moe.assignment import balanced_assignment
from dive.moe.cut import common_channels, cut_experts
from dive.moe.layer import ExpertLayer
from dive.moe.walk import Group, StatisticsWalk, together
from dive.pruning.metrics import importance
from dive.ranks import ALONE, Ranks

WALK = StatisticsWalk
ITERATIONS = 3
"""Of k-means at most; it stops earlier when no channel moves. More gain next to nothing."""


def layer(
    weights: FFN,
    groups: Sequence[Group],
    pruning: PruningConfig,
    moe: MoEConfig,
    *,
    seed: int,
    ranks: Ranks = ALONE,
) -> ExpertLayer:
    """The experts of one layer, from all text together.

    CMoE adds the chosen experts up; the stock classes average them, which is right for the common channels alone. Without a
    refit the others are scaled up.

    Raises:
        UserError: the statistics count no co-activation.
    """
    assert moe.coactivation is not None
    union = together(groups)
    if union.statistics.coactivation is None:
        raise UserError("moe=coactivation needs co-activations: collect_statistics(..., active_channels=10)")
    width = pruning.width(weights.down.shape[1])
    scores = importance(pruning.score_metric, weights, union.statistics, seed=seed)
    common = common_channels(moe.coactivation.shared, width)
    masks = coactivation_masks(
        union.statistics.coactivation[0], scores, experts=moe.experts, width=width, common=common
    )
    scale = torch.where(masks.all(dim=0), 1.0, float(moe.top_k))
    return cut_experts(weights, masks, [union] * moe.experts, groups, pruning, moe, seed=seed, scale=scale, ranks=ranks)


def coactivation_masks(coactivation: Tensor, importance: Tensor, *, experts: int, width: int, common: int) -> Tensor:
    """Channels of each expert, (E, F) bool, each with exactly ``width``.

    The ``common`` channels that are active most often stand in every expert (CMoE's shared expert). The others are divided
    by :func:`balanced_clusters`. Where the experts have fewer places than there are channels, the least important ones are
    left out; where they have more, each expert fills up with the channels that fire most often together with its own.

    Args:
        coactivation: (F, F), tokens on which both channels are active; the diagonal counts each channel's own.
        importance: (F,), decides between channels that are active equally often.
        experts: E.
        width: channels of an expert.
        common: of those, the ones all experts have; less than ``width``.
    """
    counts = coactivation.double().cpu().numpy()
    weight = importance.double().cpu().numpy()
    places = width - common
    # lexsort sorts by its last key first.
    by_rate = np.lexsort((-weight, -counts.diagonal()))
    rest = np.sort(by_rate[common:])
    if len(rest) > experts * places:
        rest = np.sort(rest[np.argsort(-weight[rest], kind="stable")[: experts * places]])
    clusters = balanced_clusters(counts[np.ix_(rest, rest)], experts=experts)
    masks = torch.zeros(experts, len(counts), dtype=torch.bool)
    for expert in range(experts):
        own = rest[clusters == expert]
        others = rest[clusters != expert]
        together = counts[np.ix_(others, own)].mean(axis=1) if len(own) else np.zeros(len(others))
        fill = others[np.lexsort((-weight[others], -together))[: places - len(own)]]
        masks[expert, np.concatenate([by_rate[:common], own, fill])] = True
    return masks


def balanced_clusters(coactivation: NDArray[np.float64], *, experts: int) -> NDArray[np.int64]:
    """Cluster of each channel, (n,): k-means of their activation patterns into clusters whose sizes differ by at most one.

    A channel's pattern is the vector over tokens that is 1 where it is active. Squared distances between patterns and means
    of patterns follow from the co-activation counts alone (kernel k-means), so no pattern is kept. Each step assigns all
    channels at once at the least sum of distances (:func:`balanced_assignment`), as CMoE does by the Hungarian method. It
    starts from the channel that is active most often, and then each time from the one farthest from those; CMoE takes the E
    most active ones, which may be alike.

    Args:
        coactivation: (n, n).
        experts: number of clusters.
    """
    n = len(coactivation)
    sizes = np.full(experts, n // experts)
    sizes[: n % experts] += 1
    active = coactivation.diagonal()
    member = np.zeros((n, experts))  # columns are means: 1 / size for the members
    seed, nearest = int(active.argmax()), np.full(n, np.inf)
    for cluster in range(min(experts, n)):
        member[seed, cluster] = 1.0
        nearest = np.minimum(nearest, active + active[seed] - 2 * coactivation[:, seed])
        seed = int(nearest.argmax())
    clusters = np.full(n, -1)
    for _ in range(ITERATIONS):
        together = coactivation @ member
        distance = active[:, None] - 2 * together + (member * together).sum(axis=0)
        moved, clusters = clusters, balanced_assignment(distance, sizes)
        if np.array_equal(moved, clusters):
            break
        member = (clusters[:, None] == np.arange(experts)) / np.maximum(sizes, 1)
    return clusters
