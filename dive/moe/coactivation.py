"""Experts of channels that fire together (MoEfication, arXiv 2110.01786; CMoE, arXiv 2502.04416).

Shapes: F channels, E experts, n channels to divide.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ITERATIONS = 3
"""Of k-means at most; it stops earlier when no channel moves. More gain next to nothing, and each costs O(n³)."""


def coactivation_masks(coactivation: Tensor, importance: Tensor, *, experts: int, width: int, shared: int) -> Tensor:
    """Channels of each expert, (E, F) bool, each with exactly ``width``.

    The ``shared`` channels that are active most often stand in every expert (CMoE's shared expert). The others are divided
    by :func:`balanced_clusters`. Where the experts have fewer places than there are channels, the least important ones are
    left out; where they have more, each expert fills up with the channels that fire most often together with its own.

    Args:
        coactivation: (F, F), tokens on which both channels are active; the diagonal counts each channel's own.
        importance: (F,), decides between channels that are active equally often.
        experts: E.
        width: channels of an expert.
        shared: of those, the ones all experts have; less than ``width``.
    """
    counts = coactivation.double().cpu().numpy()
    weight = importance.double().cpu().numpy()
    places = width - shared
    # lexsort sorts by its last key first.
    by_rate = np.lexsort((-weight, -counts.diagonal()))
    rest = np.sort(by_rate[shared:])
    if len(rest) > experts * places:
        rest = np.sort(rest[np.argsort(-weight[rest], kind="stable")[: experts * places]])
    clusters = balanced_clusters(counts[np.ix_(rest, rest)], experts=experts)
    masks = torch.zeros(experts, len(counts), dtype=torch.bool)
    for expert in range(experts):
        own = rest[clusters == expert]
        others = rest[clusters != expert]
        together = counts[np.ix_(others, own)].mean(axis=1) if len(own) else np.zeros(len(others))
        fill = others[np.lexsort((-weight[others], -together))[: places - len(own)]]
        masks[expert, np.concatenate([by_rate[:shared], own, fill])] = True
    return masks


def balanced_clusters(coactivation: NDArray[np.float64], *, experts: int) -> NDArray[np.int64]:
    """Cluster of each channel, (n,): k-means of their activation patterns into clusters whose sizes differ by at most one.

    A channel's pattern is the vector over tokens that is 1 where it is active. Squared distances between patterns and means
    of patterns follow from the co-activation counts alone (kernel k-means), so no pattern is kept. Each step assigns all
    channels at once by the Hungarian method, as in CMoE. It starts from the channel that is active most often, and then
    each time from the one farthest from those; CMoE takes the E most active ones, which may be alike.

    Args:
        coactivation: (n, n).
        experts: number of clusters.
    """
    n = len(coactivation)
    sizes = np.full(experts, n // experts)
    sizes[: n % experts] += 1
    active = coactivation.diagonal()
    place = np.repeat(np.arange(experts), sizes)  # the cluster of each place
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
        _, taken = linear_sum_assignment(distance[:, place])
        moved, clusters = clusters, place[taken]
        if np.array_equal(moved, clusters):
            break
        member = (clusters[:, None] == np.arange(experts)) / np.maximum(sizes, 1)
    return clusters
