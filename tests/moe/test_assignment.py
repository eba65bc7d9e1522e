"""Division among clusters of given sizes: against scipy's Hungarian method, and where rows are alike."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from dive.moe.assignment import balanced_assignment

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def even(n: int, clusters: int) -> Integers:
    sizes = np.full(clusters, n // clusters)
    sizes[: n % clusters] += 1
    return sizes


def least(cost: Floats, sizes: Integers) -> float:
    """The least sum there is: every place of a cluster is a column of its own."""
    columns = cost[:, np.repeat(np.arange(len(sizes)), sizes)]
    return float(columns[linear_sum_assignment(columns)].sum())


def check(cost: Floats, sizes: Integers) -> None:
    found = balanced_assignment(cost, sizes)
    assert np.bincount(found, minlength=len(sizes)).tolist() == sizes.tolist()
    assert cost[np.arange(len(cost)), found].sum() == pytest.approx(least(cost, sizes), rel=1e-9, abs=1e-9)
    assert np.array_equal(found, balanced_assignment(cost, sizes))


def clustered(rng: np.random.Generator, n: int, clusters: int) -> Floats:
    """Squared distances of points in heaps of very different sizes from some of the points."""
    heaps = rng.normal(size=(2 * clusters, 16)) * 5
    points = heaps[rng.choice(2 * clusters, n, p=rng.dirichlet(np.ones(2 * clusters)))] + rng.normal(size=(n, 16))
    apart: Floats = ((points[:, None] - points[rng.choice(n, clusters)]) ** 2).sum(axis=-1)
    return apart


def test_by_hand() -> None:
    # All three want cluster 0; the second loses least by going elsewhere: 1 + 3 + 2.
    cost = np.array([[1.0, 9.0], [2.0, 3.0], [2.0, 8.0]])
    assert balanced_assignment(cost, np.array([2, 1])).tolist() == [0, 1, 0]
    # One of 0's two rows has to go: to 1, whose own goes on to 2. 1 + 0 + 1, where straight to 2 would be 9 + 0 + 0.
    chain = np.array([[0.0, 1.0, 9.0], [0.0, 5.0, 9.0], [5.0, 0.0, 1.0]])
    assert balanced_assignment(chain, np.array([1, 1, 1])).tolist() == [1, 0, 2]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "clusters"), [(400, 8), (301, 3), (200, 32), (8, 8), (5, 9), (4, 1), (1, 3)])
def test_nothing_costs_less(n: int, clusters: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    check(rng.random((n, clusters)), even(n, clusters))
    check(clustered(rng, n, clusters), even(n, clusters))
    check(rng.normal(size=(n, clusters)) * 1e6 - 1e7, even(n, clusters))


@pytest.mark.parametrize("seed", range(3))
def test_any_sizes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    check(rng.random((300, 6)), rng.multinomial(300, rng.dirichlet(np.full(6, 0.3))))
    check(rng.random((50, 4)), np.array([0, 50, 0, 0]))
    check(rng.random((50, 4)), np.array([49, 0, 1, 0]))


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_rows_that_are_alike(levels: int) -> None:
    """Counts of whole tokens tie by the hundred, and no price parts rows that are alike."""
    rng = np.random.default_rng(levels)
    check(rng.integers(0, levels, (600, 8)).astype(float), even(600, 8))
    check(np.repeat(rng.random((6, 5)), 100, axis=0), even(600, 5))
    check(np.zeros((600, 8)), even(600, 8))


def test_distances_of_channels_that_seldom_fire() -> None:
    rng = np.random.default_rng(0)
    fires = (rng.random((500, 700)) < rng.beta(0.3, 5, 700)).astype(float)
    counts, seeds = fires.T @ fires, rng.choice(700, 8)
    check(counts.diagonal()[:, None] - 2 * counts[:, seeds] + counts.diagonal()[seeds], even(700, 8))
