"""Rows divided among clusters of given sizes at the least cost.

Shapes: n rows, E clusters.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SWEEPS = 20
"""Over the prices at most. More save few exchanges."""
ROUNDING = 1e-12
"""Of the costs' range: two ways that differ by less cost the same. Following rounding errors could go in circles."""


def balanced_assignment(cost: Floats, sizes: Integers) -> Integers:
    """Cluster of each row, (n,), such that cluster e has exactly ``sizes[e]`` rows and the sum of costs is the least.

    This is the transportation problem with few sinks. A matching of rows with places (the Hungarian method) solves it in
    O(n³), since it keeps a price for every place. The places of a cluster are all alike, so E prices are enough: BASE layers
    (arXiv 2103.16716) auction tokens off that way. First each cluster in turn takes the price at which just ``sizes[e]`` rows
    want it, which is an auction whose bids are sorted, O(n E²) a sweep. What ties and the last sweep leave too much goes
    where there is room along the cheapest chains of exchanges (successive shortest paths: Ahuja, Magnanti and Orlin, Network
    Flows, 9.7), which makes the sum the least there is, but for rounding. Deterministic; rows that cost the same may fall
    either way.

    Args:
        cost: (n, E), finite.
        sizes: (E,), which add up to n.
    """
    assert sizes.sum() == len(cost)
    columns = np.ascontiguousarray(cost.T)
    return _exchanged(columns, _auctioned(columns, sizes), sizes)


def _auctioned(cost: Floats, sizes: Integers) -> Integers:
    """The cheapest cluster of each row (n,) at prices that fill the clusters nearly as wanted; ``cost`` is (E, n)."""
    n, priced = cost.shape[1], cost.copy()
    priced[sizes == 0] = np.inf
    for _ in range(SWEEPS):
        moved = False
        for cluster, size in enumerate(sizes):
            if not 0 < size < n:
                continue
            before = priced[cluster].copy()
            priced[cluster] = np.inf
            worth = priced.min(axis=0) - cost[cluster]  # the price from which a row goes elsewhere
            worth.partition((n - size - 1, n - size))
            priced[cluster] = cost[cluster] + (worth[n - size - 1] + worth[n - size]) / 2
            moved = moved or not np.array_equal(before, priced[cluster])
        if not moved:
            break
    cheapest: Integers = priced.argmin(axis=0)
    return cheapest


def _exchanged(cost: Floats, clusters: Integers, sizes: Integers) -> Integers:
    """The best of all that have these sizes, from clusters (n,) that are the best of all that have theirs."""
    experts = len(sizes)
    surplus = np.bincount(clusters, minlength=experts) - sizes
    same = ROUNDING * np.ptp(cost)
    dearer = np.full((experts, experts), np.inf)  # what it costs to send the row that costs least from one to another

    def extra(source: int) -> tuple[Integers, Floats]:
        """(rows of a cluster (m,), what each costs more in each cluster (E, m))."""
        rows = np.flatnonzero(clusters == source)
        return rows, cost[:, rows] - cost[source, rows]

    def look(source: int) -> None:
        dearer[source] = extra(source)[1].min(axis=1, initial=np.inf)
        dearer[source, source] = np.inf

    for cluster in range(experts):
        look(cluster)
    while (surplus > 0).any():
        way = _cheapest_way(dearer, surplus, same)
        count, moves = min(surplus[way[0]], -surplus[way[-1]]), []
        for source, target in pairwise(way):
            rows, more = extra(source)
            moves.append(rows[more[target] <= dearer[source, target]])  # several, where rows are alike
            count = min(count, len(moves[-1]))
        for rows, target in zip(moves, way[1:], strict=True):
            clusters[rows[:count]] = target
        surplus[way[0]] -= count
        surplus[way[-1]] += count
        for cluster in way:
            look(cluster)
    return clusters


def _cheapest_way(dearer: Floats, surplus: Integers, same: float) -> list[int]:
    """Clusters from one with too many rows to one with too few; edges may cost less than nothing (Bellman and Ford)."""
    length, before = np.where(surplus > 0, 0.0, np.inf), np.full(len(surplus), -1)
    for _ in range(len(surplus)):
        through = length[:, None] + dearer
        source = through.argmin(axis=0)
        shorter = through.min(axis=0) < length - same
        if not shorter.any():
            break
        length, before = np.where(shorter, through.min(axis=0), length), np.where(shorter, source, before)
    way = [int(np.where(surplus < 0, length, np.inf).argmin())]
    while before[way[-1]] >= 0:
        way.append(int(before[way[-1]]))
    return way[::-1]
