"""Affinity, correlation, clustering and silhouette, worked out by hand."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from dive.affinity.grouping import (
    adjusted_rand_index,
    affinity,
    cluster_distances,
    cluster_domains,
    distances,
    favourite_groups,
    group_domains,
    random_groups,
    routing_overlap,
    silhouette,
    similarity_distances,
)
from dive.config import Linkage
from dive.errors import UserError

# Two pairs: models pruned on a or b do well on a and b, those pruned on c or d on c and d.
PAIRS = [
    [10.0, 10.0, 40.0, 50.0],
    [12.5, 10.0, 50.0, 40.0],
    [40.0, 50.0, 20.0, 20.0],
    [50.0, 40.0, 20.0, 25.0],
]


def test_affinity_by_hand() -> None:
    # Each column divided into its smallest entry: 10 / P, 10 / P, 20 / P, 20 / P.
    assert affinity(PAIRS).tolist() == [
        [1.0, 1.0, 0.5, 0.4],
        [0.8, 1.0, 0.4, 0.5],
        [0.25, 0.2, 1.0, 1.0],
        [0.2, 0.25, 1.0, 0.8],
    ]


def test_distances_by_hand() -> None:
    # Affinity columns: 4 / (4, 5, 8) and 3 / (6, 3, 4), rows (1, 0.5), (0.8, 1), (0.5, 0.75): two numbers correlate ±1.
    found = distances([[4.0, 6.0], [5.0, 3.0]])
    assert found.tolist() == pytest.approx(np.array([[0.0, 2.0], [2.0, 0.0]]))
    # Rows (1, 1, 0.5), (0.5, 1, 1): centred (1, 1, -2) / 6 and (-2, 1, 1) / 6; r = (-2 + 1 - 2) / 6 = -1/2.
    found = distances([[1.0, 1.0, 2.0], [2.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    assert found.tolist() == pytest.approx(np.array([[0, 1.5, 0], [1.5, 0, 1.5], [0, 1.5, 0]]), abs=1e-12)


def test_a_row_without_variance_correlates_with_nothing() -> None:
    # The first model is the best everywhere: its affinities are all 1.
    found = distances([[1.0, 1.0, 1.0], [2.0, 4.0, 3.0], [4.0, 2.0, 3.0]])
    assert found[0].tolist() == [0.0, 1.0, 1.0]
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("experts", "groups"),
    [
        (1, [["a", "b", "c", "d"]]),
        (2, [["a", "b"], ["c", "d"]]),
        (4, [["a"], ["b"], ["c"], ["d"]]),
    ],
)
@pytest.mark.parametrize("method", Linkage)
def test_groups(experts: int, groups: list[list[str]], method: Linkage) -> None:
    assert cluster_domains(PAIRS, list("abcd"), experts=experts, method=method).groups == groups


def test_three_groups_split_the_looser_pair() -> None:
    found = distances(PAIRS)
    tight, loose = sorted([(found[0, 1], ["a", "b"]), (found[2, 3], ["c", "d"])])
    assert tight[0] < loose[0]
    expected = [tight[1], *([name] for name in loose[1])]
    assert sorted(group_domains(PAIRS, list("abcd"), experts=3)) == sorted(expected)


def test_groups_come_in_the_order_of_their_first_domain() -> None:
    order = [2, 0, 3, 1]
    shuffled = np.array(PAIRS)[np.ix_(order, order)]
    assert group_domains(shuffled, ["c", "a", "d", "b"], experts=2) == [["c", "d"], ["a", "b"]]


@pytest.mark.parametrize("experts", range(1, 9))
@pytest.mark.parametrize(
    "matrix",
    [np.ones((8, 8)), np.kron(np.ones((4, 4)) + np.eye(4), np.ones((2, 2))), 3.0 - 2 * np.eye(8)],
    ids=["all the same", "pairs of the same", "all as far apart"],
)
def test_exactly_so_many_groups_even_with_ties(matrix: np.ndarray, experts: int) -> None:
    names = list("abcdefgh")
    groups = group_domains(matrix, names, experts=experts)
    assert len(groups) == experts
    assert sorted(name for group in groups for name in group) == names


@pytest.mark.parametrize(
    ("method", "rule"), [(Linkage.average, np.mean), (Linkage.complete, max), (Linkage.single, min)]
)
def test_linkage_by_hand(method: Linkage, rule: Callable[[list[float]], float]) -> None:
    clustering = cluster_domains(PAIRS, list("abcd"), experts=2, method=method)
    found = distances(PAIRS)
    between = rule([found[i, j] for i in (0, 1) for j in (2, 3)])
    assert clustering.tree[:, 2].tolist() == pytest.approx(
        [min(found[0, 1], found[2, 3]), max(found[0, 1], found[2, 3]), between]
    )
    # Heights at which the six pairs meet in the tree, against their distances.
    pairs = list(combinations(range(4), 2))
    heights = [between if (i < 2) != (j < 2) else found[i, j] for i, j in pairs]
    expected = np.corrcoef(heights, [found[i, j] for i, j in pairs])[0, 1]
    assert clustering.cophenetic == pytest.approx(expected)
    assert 0.9 < clustering.silhouette < 1


def test_silhouette_by_hand() -> None:
    # Points 0, 1 | 4, 6 | 10 on a line.
    points = np.array([0.0, 1.0, 4.0, 6.0, 10.0])
    distance = np.abs(points[:, None] - points[None])
    # 0: inside 1, nearest (4 + 6) / 2 = 5 → 4/5.   1: inside 1, nearest (3 + 5) / 2 = 4 → 3/4.
    # 4: inside 2, nearest (4 + 3) / 2 = 3.5 → 1.5/3.5.   6: inside 2, nearest 4 → 2/4.   10 is alone: 0.
    expected = (4 / 5 + 3 / 4 + 1.5 / 3.5 + 2 / 4 + 0) / 5
    assert silhouette(distance, np.array([0, 0, 1, 1, 2])) == pytest.approx(expected)


@pytest.mark.parametrize(("labels", "expected"), [([0, 0, 0], 0.0), ([0, 1, 2], 0.0)])
def test_silhouette_of_one_group_or_of_single_domains(labels: list[int], expected: float) -> None:
    assert silhouette(1.0 - np.eye(3), np.array(labels)) == expected


def test_one_and_two_domains() -> None:
    assert group_domains([[7.0]], ["a"], experts=1) == [["a"]]
    clustering = cluster_domains([[1.0, 2.0], [2.0, 1.0]], ["a", "b"], experts=2)
    assert clustering.groups == [["a"], ["b"]]
    assert clustering.cophenetic == 1.0


@pytest.mark.parametrize(
    ("matrix", "experts", "message"),
    [
        (PAIRS, 5, r"moe\.experts \(5\) must lie between 1 and the number of domains \(4\)"),
        (PAIRS, 0, r"moe\.experts \(0\)"),
        (np.ones((3, 4)), 2, r"the matrix is \(3, 4\), the domains are 4"),
    ],
)
def test_groups_that_cannot_be_are_refused(matrix: np.ndarray, experts: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        group_domains(matrix, list("abcd"), experts=experts)


@pytest.mark.parametrize(("domains", "experts", "sizes"), [(23, 8, [2] + [3] * 7), (8, 4, [2] * 4), (3, 3, [1] * 3)])
def test_random_groups(domains: int, experts: int, sizes: list[int]) -> None:
    names = [f"domain {i:02d}" for i in range(domains)]
    groups = random_groups(names, experts=experts, seed=0)
    assert sorted(map(len, groups)) == sizes
    assert sorted(name for group in groups for name in group) == names
    assert groups == random_groups(names, experts=experts, seed=0)
    assert any(groups != random_groups(names, experts=experts, seed=seed) for seed in (1, 2))
    with pytest.raises(UserError, match="exceeds the number of domains"):
        random_groups(names, experts=domains + 1, seed=0)


# ------------------------------------------------------------------------------------------------- agreement


def test_adjusted_rand_index_by_hand() -> None:
    # The example of Hubert and Arabie's formula: contingency 1 1 0 / 1 2 1 / 0 0 4 over 10 domains.
    # Pairs together in both 7, in the first 1 + 6 + 6 = 13, in the second 1 + 3 + 10 = 14, of 45 in all:
    # (7 - 13 · 14 / 45) / (13.5 - 13 · 14 / 45).
    one = [list("ab"), list("cdef"), list("ghij")]
    other = [list("ac"), list("bde"), list("fghij")]
    assert adjusted_rand_index(one, other) == pytest.approx((7 - 182 / 45) / (13.5 - 182 / 45))
    assert adjusted_rand_index(other, one) == pytest.approx(adjusted_rand_index(one, other))


def test_equal_partitions_agree_wholly_and_random_ones_not_on_average() -> None:
    names = [str(i) for i in range(23)]
    groups = random_groups(names, experts=8, seed=0)
    assert adjusted_rand_index(groups, groups[::-1]) == 1.0
    assert adjusted_rand_index([[n] for n in names], [[n] for n in names]) == 1.0
    assert adjusted_rand_index([names], [names]) == 1.0
    drawn = [adjusted_rand_index(groups, random_groups(names, experts=8, seed=seed)) for seed in range(1, 200)]
    assert abs(float(np.mean(drawn))) < 0.02


def test_similarities_become_distances() -> None:
    # Not quite symmetric by rounding; the diagonal is no distance.
    found = similarity_distances([[1.0, 0.5, -1.0], [0.5000002, 0.9999, 0.0], [-1.0, 0.0, 1.0]])
    np.testing.assert_allclose(found, [[0, 0.5, 2.0], [0.5, 0, 1.0], [2.0, 1.0, 0]], atol=1e-6)
    assert np.array_equal(found, found.T)
    groups = cluster_distances(found, ["a", "b", "c"], experts=2).groups
    assert groups == [["a", "b"], ["c"]]


SHARE = {"a": [0.6, 0.4], "b": [0.9, 0.1], "c": [0.2, 0.8]}


def test_domains_by_the_expert_that_gets_most_of_their_tokens() -> None:
    assert favourite_groups(SHARE) == [["a", "b"], ["c"]]
    assert favourite_groups({"a": [0.5, 0.5], "b": [0.4, 0.6]}) == [["a"], ["b"]]  # the first of two alike


def test_routing_that_two_domains_have_in_common_by_hand() -> None:
    # Layer 0: a and b have min(0.6, 0.9) + min(0.4, 0.1) = 0.7, a and c 0.2 + 0.4 = 0.6, b and c 0.2 + 0.1 = 0.3; layer 1: all 1.
    by_layer = {domain: [shares, [0.5, 0.5]] for domain, shares in SHARE.items()}
    within, between = routing_overlap(by_layer, [["a", "b"], ["c"]])
    assert within == pytest.approx((0.7 + 1) / 2)
    assert between == pytest.approx(((0.6 + 1) / 2 + (0.3 + 1) / 2) / 2)
    assert routing_overlap(by_layer, [["a"], ["b"]]) == (None, pytest.approx(0.85))  # c is in no group
