"""k-means, against scipy's and by hand."""

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from dive.moe.clustering import ROUNDS, kmeans, nearest


def sample(kind: str, seed: int, *, count: int = 1500, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    heaps = torch.randn(12, width, generator=generator) * {"noise": 0.0, "overlapping": 1.0, "apart": 4.0}[kind]
    points = heaps[torch.randint(12, (count,), generator=generator)] + torch.randn(count, width, generator=generator)
    return points * torch.linspace(0.2, 2.0, width) + 3.0


def inertia(rows: Tensor, centres: Tensor) -> float:
    return float(torch.cdist(rows.double(), centres.double()).amin(dim=1).square().sum())


@pytest.mark.parametrize("kind", ["noise", "overlapping", "apart"])
def test_as_good_as_scipys(kind: str) -> None:
    ours, theirs = [], []
    for seed in range(8):
        rows = sample(kind, seed)
        ours.append(inertia(rows, kmeans(rows, 8, seed=seed)))
        centres, _ = kmeans2(rows.double().numpy(), 8, iter=ROUNDS, minit="++", rng=seed)
        theirs.append(inertia(rows, torch.from_numpy(centres)))
    assert np.mean(ours) < 1.01 * np.mean(theirs)
    if kind == "noise":  # where there is one way to divide them as good as any other
        np.testing.assert_allclose(ours, theirs, rtol=0.01)


@pytest.mark.parametrize("kind", ["noise", "overlapping"])
def test_rounds_are_lloyds(kind: str) -> None:
    """From the same start scipy, in float64, comes to the same centres."""
    rows = sample(kind, 0)
    start = kmeans(rows, 8, seed=1, rounds=0)
    assert torch.cdist(start.double(), rows.double()).amin(dim=1).max() < 1e-5  # rows themselves
    for rounds in (1, 4):
        centres, _ = kmeans2(rows.double().numpy(), start.double().numpy(), iter=rounds, minit="matrix")
        np.testing.assert_allclose(kmeans(rows, 8, seed=1, rounds=rounds).numpy(), centres, atol=1e-3)


def test_heaps_that_are_apart_are_found() -> None:
    for seed in range(10):
        rows = sample("apart", seed, count=400)
        assert inertia(rows, kmeans(rows, 12, seed=seed)) < 1.05 * 400 * float(
            torch.linspace(0.2, 2.0, 24).square().sum()
        )


def test_far_from_the_origin_no_digit_is_lost() -> None:
    """Squares are 1e8 times the distances here: float32 has seven digits."""
    rows = sample("apart", 0)
    far = rows + 1e4
    near = nearest(rows, kmeans(rows, 8, seed=0))
    moved = kmeans(far, 8, seed=0)
    assert inertia(far, moved) == pytest.approx(inertia(rows, kmeans(rows, 8, seed=0)), rel=1e-2)
    found = nearest(far, moved)
    assert torch.equal(found, torch.cdist(far.double(), moved.double()).argmin(dim=1))
    assert (found == near).double().mean() > 0.99


def test_the_same_seed_is_the_same_and_another_is_not() -> None:
    rows = sample("noise", 0)
    before = rows.clone()
    assert torch.equal(kmeans(rows, 8, seed=0), kmeans(rows, 8, seed=0))
    assert torch.equal(rows, before)
    assert not torch.equal(kmeans(rows, 8, seed=0), kmeans(rows, 8, seed=1))


def test_a_cluster_that_loses_its_rows_starts_over_at_the_farthest(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([[0.0], [1.0], [2.0], [10.0], [30.0]])
    # One centre takes all five rows; the others, far away, none, and are given 30 and 10 in the order of their distance.
    monkeypatch.setattr("dive.moe.clustering._start", lambda *_, **__: torch.tensor([[0.0], [500.0], [900.0]]))
    assert sorted(kmeans(rows, 3, seed=0, rounds=2).flatten().tolist()) == pytest.approx([1.0, 10.0, 30.0])


@pytest.mark.parametrize("count", [1, 3, 8])
def test_fewer_kinds_of_rows_than_clusters(count: int) -> None:
    kinds = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))
    for rows in (kinds, kinds.repeat(50, 1)):
        centres = kmeans(rows, 8, seed=0)
        assert centres.shape == (8, 4)
        assert inertia(rows, centres) < 1e-9
    assert torch.equal(kmeans(kinds[:1], 1, seed=0), kinds[:1])


def test_nearest_by_hand() -> None:
    rows, centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.9, 9.0]]), torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    assert nearest(rows, centres).tolist() == [0, 1, 0]
