"""Clusters of rows: k-means on the device that holds them.

Shapes: T rows, D their width, E clusters.
"""

import math

import torch
from torch import Tensor

ROUNDS = 10
"""Of Lloyd's algorithm at most; it stops earlier when no row moves."""
PART = 2048
"""Rows of one matrix product: few enough for a CPU's cache, many enough for a GPU."""


def kmeans(rows: Tensor, clusters: int, *, seed: int, rounds: int = ROUNDS) -> Tensor:
    """Centres of k-means, (E, D) of the rows' element type and device.

    Greedy k-means++ (Arthur and Vassilvitskii, 2007; several candidates each time, as in scikit-learn) and Lloyd's
    algorithm, both in matrix products of float32. A cluster that loses all its rows starts over from the row farthest from
    its centre. The same seed gives the same centres on the same device; on another one they may differ by rounding.

    This is no library's: scipy and scikit-learn run on a CPU alone, faiss and cuML are hundreds of megabytes, and faiss
    begins from random rows.

    Args:
        rows: (T, D), finite; at least one.
        clusters: E.
        seed: of the start.
        rounds: of Lloyd's algorithm at most.
    """
    # |x|² − 2 x·c + |c|² loses the digits that |x|² has more than the distance: without the mean there are few.
    mean = rows.mean(dim=0)
    rows = rows - mean
    squares = torch.linalg.vector_norm(rows, dim=1).square()
    return (_lloyd(rows, squares, _start(rows, squares, clusters, seed=seed), rounds) + mean).to(rows.dtype)


def nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each row, (T,) int64, for rows (T, D) and centres (E, D); the first of several."""
    mean = centres.mean(dim=0)
    return _scores(rows - mean, centres - mean).argmin(dim=1)


def _scores(rows: Tensor, centres: Tensor) -> Tensor:
    """Squared distances without the rows' own squares, (T, E)."""
    return torch.addmm(centres.square().sum(dim=1), rows, centres.T, alpha=-2.0)


def _start(rows: Tensor, squares: Tensor, clusters: int, *, seed: int) -> Tensor:
    """(E, D) of rows (T, D) with squares (T,): each the best of a few, drawn by squared distance from those before."""
    generator = torch.Generator().manual_seed(seed)  # on the host: the same draws on any device
    tried = 2 + int(math.log(clusters))
    draws = torch.rand(clusters, tried, generator=generator, dtype=torch.float64).to(rows.device)
    chosen = (draws[0, :1] * len(rows)).long()
    distance = (squares + _scores(rows, rows[chosen])[:, 0]).clamp_min(0.0)
    for number in range(1, clusters):
        sums = distance.cumsum(dim=0, dtype=torch.float64)
        candidates = torch.searchsorted(sums, draws[number] * sums[-1], right=True).clamp_max(len(rows) - 1)
        distances = (squares[:, None] + _scores(rows, rows[candidates])).clamp_min_(0.0)
        distances = torch.minimum(distances, distance[:, None])
        best = distances.sum(dim=0, dtype=torch.float64).argmin()
        chosen = torch.cat([chosen, candidates[best, None]])
        distance = distances[:, best]
    return rows[chosen]


def _lloyd(rows: Tensor, squares: Tensor, centres: Tensor, rounds: int) -> Tensor:
    """Centres (E, D) float64 of rows (T, D) with squares (T,), from centres (E, D)."""
    clusters = len(centres)
    found, before = centres.double(), None
    for _ in range(rounds):
        sums, counts, apart, numbers = torch.zeros_like(found), rows.new_zeros(clusters), [], []
        for part in rows.split(PART):
            lowest, number = _scores(part, centres).min(dim=1)
            # A product, not index_add_: that adds in another order each time on CUDA.
            ones = torch.zeros(len(part), clusters, dtype=part.dtype, device=part.device)
            sums += ones.scatter_(1, number[:, None], 1.0).T @ part
            counts += ones.sum(dim=0)
            apart.append(lowest)
            numbers.append(number)
        number = torch.cat(numbers)
        if before is not None and torch.equal(number, before):
            break
        before = number
        empty = counts == 0
        farthest = (squares + torch.cat(apart)).topk(min(clusters, len(rows))).indices
        other = rows[farthest[(empty.cumsum(dim=0) - 1).clamp(0, len(farthest) - 1)]]
        found = torch.where(empty[:, None], other.double(), sums / counts.clamp_min(1)[:, None])
        centres = found.to(rows.dtype)
    return found
