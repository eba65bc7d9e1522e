"""From a matrix of cross-domain perplexities to groups of domains.

Shapes: n domains.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.hierarchy import cophenet, cut_tree, linkage
from scipy.spatial.distance import squareform

from dive.config import Linkage
from dive.errors import require


@dataclass(slots=True)
class Clustering:
    """Groups and how well they fit."""

    groups: list[list[str]]
    tree: NDArray[np.float64]
    """(n - 1, 4) linkage matrix of scipy."""
    cophenetic: float
    """Correlation of tree distances with the distances themselves, in [-1, 1]."""
    silhouette: float
    """Mean silhouette of the groups, in [-1, 1]; a domain alone counts 0."""


def affinity(perplexity: ArrayLike) -> NDArray[np.float64]:
    """A[i, j] = min_i' P[i', j] / P[i, j], (n, n): each column scaled by the best model for that domain."""
    values = np.asarray(perplexity, dtype=np.float64)
    return np.asarray(values.min(axis=0, keepdims=True) / values)


def distances(perplexity: ArrayLike) -> NDArray[np.float64]:
    """1 − Pearson correlation between the rows of the affinity matrix, (n, n), zero on the diagonal."""
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.corrcoef(affinity(perplexity))
    # A row without variance correlates with nothing.
    distance = 1.0 - np.nan_to_num(correlation, nan=0.0)
    distance = np.clip((distance + distance.T) / 2.0, 0.0, 2.0)
    np.fill_diagonal(distance, 0.0)
    return np.asarray(distance)


def similarity_distances(similarity: ArrayLike) -> NDArray[np.float64]:
    """1 − similarity, (n, n), symmetric with a zero diagonal; for similarities of at most 1."""
    values = 1.0 - np.asarray(similarity, dtype=np.float64)
    distance = np.clip((values + values.T) / 2.0, 0.0, 2.0)
    np.fill_diagonal(distance, 0.0)
    return np.asarray(distance)


def silhouette(distance: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean silhouette (Rousseeuw 1987) of a partition under a distance matrix (n, n); labels (n,)."""
    if len(np.unique(labels)) < 2:
        return 0.0
    scores = []
    for i, own in enumerate(labels):
        same = labels == own
        if same.sum() == 1:
            scores.append(0.0)
            continue
        inside = distance[i, same].sum() / (same.sum() - 1)
        nearest = min(distance[i, labels == other].mean() for other in np.unique(labels) if other != own)
        largest = max(inside, nearest)
        scores.append(0.0 if largest == 0 else (nearest - inside) / largest)
    return float(np.mean(scores))


def cluster_domains(
    matrix: ArrayLike, domains: Sequence[str], *, experts: int, method: Linkage = Linkage.complete
) -> Clustering:
    """Hierarchical clustering of the domains into exactly ``experts`` groups (DIVE, section 3.1).

    Args:
        matrix: perplexities P, (n, n), see :func:`dive.cross_domain_perplexity`.
        domains: names of its rows.
        experts: number of groups, 1 to n.
        method: linkage rule on 1 − r. The paper does not name its own; complete linkage keeps groups of like size.

    Raises:
        UserError: more groups than domains, or a matrix of another size.
    """
    n = len(domains)
    values = np.asarray(matrix, dtype=np.float64)
    require(values.shape == (n, n), f"the matrix is {values.shape}, the domains are {n}")
    distance = distances(values) if n > 1 else np.zeros((1, 1))
    return cluster_distances(distance, domains, experts=experts, method=method)


def cluster_distances(
    distance: NDArray[np.float64], domains: Sequence[str], *, experts: int, method: Linkage = Linkage.complete
) -> Clustering:
    """:func:`cluster_domains` from distances (n, n), symmetric with a zero diagonal.

    Raises:
        UserError: more groups than domains.
    """
    n = len(domains)
    require(1 <= experts <= n, f"moe.experts ({experts}) must lie between 1 and the number of domains ({n})")
    if n == 1:
        return Clustering([[domains[0]]], np.zeros((0, 4)), 0.0, 0.0)
    condensed = squareform(distance, checks=False)
    tree = linkage(condensed, method=method.value)
    labels = cut_tree(tree, n_clusters=experts)[:, 0]
    groups: dict[int, list[str]] = {}
    for domain, label in zip(domains, labels, strict=True):
        groups.setdefault(int(label), []).append(domain)
    with np.errstate(invalid="ignore", divide="ignore"):
        fit = float(np.nan_to_num(cophenet(tree, condensed)[0])) if n > 2 else 1.0
    return Clustering(list(groups.values()), np.asarray(tree), fit, silhouette(distance, np.asarray(labels)))


def group_domains(matrix: ArrayLike, domains: Sequence[str], *, experts: int) -> list[list[str]]:
    """Cut the domains into as many groups as there are experts, by hierarchical clustering with complete linkage.

    Args:
        matrix: (n, n) perplexity on each domain of the model pruned on each, see :func:`dive.cross_domain_perplexity`.
        domains: names of its rows and columns.
        experts: how many groups.

    Returns:
        The domains of each group, in the order in which their first domain appears.

    Raises:
        UserError: there are more groups than domains, or the matrix has another size.
    """
    return cluster_domains(matrix, domains, experts=experts).groups


def adjusted_rand_index(one: Sequence[Sequence[str]], other: Sequence[Sequence[str]]) -> float:
    """Agreement of two partitions of the same domains (Hubert and Arabie 1985): 1 if equal, 0 on average if random."""
    table = np.array([[len(set(a) & set(b)) for b in other] for a in one])

    def pairs(counts: NDArray[np.int64]) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, ours, theirs = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    total = pairs(np.array([table.sum()]))
    expected = ours * theirs / total if total else 0.0
    largest = (ours + theirs) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)


def favourite_groups(share: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """Domains by the expert that gets most of their tokens; share: {domain: (E,)}."""
    found: dict[int, list[str]] = {}
    for domain, shares in share.items():
        found.setdefault(int(np.argmax(shares)), []).append(domain)
    return list(found.values())


def routing_overlap(
    by_layer: Mapping[str, ArrayLike], groups: Sequence[Sequence[str]]
) -> tuple[float | None, float | None]:
    """How alike two domains are routed, Σ_e min(p_e, q_e): 1 if equally, 0 if they share no expert.

    Args:
        by_layer: {domain: (L, E)}, shares of its tokens.

    Returns:
        Mean over layers and pairs of domains of one group, and of different groups; none where there is no such pair.
    """
    group = {domain: number for number, members in enumerate(groups) for domain in members}
    found: dict[bool, list[float]] = {True: [], False: []}
    for one, other in itertools.combinations([domain for domain in by_layer if domain in group], 2):
        alike = np.minimum(by_layer[one], by_layer[other]).sum(axis=-1).mean()
        found[group[one] == group[other]].append(float(alike))
    within, between = (float(np.mean(values)) if values else None for values in (found[True], found[False]))
    return within, between


def random_groups(domains: Sequence[str], *, experts: int, seed: int) -> list[list[str]]:
    """Domains dealt out at random into groups whose sizes differ by at most one (DIVE's ablation)."""
    require(experts <= len(domains), f"moe.experts ({experts}) exceeds the number of domains ({len(domains)})")
    order = np.random.default_rng(seed).permutation(len(domains))
    return [[domains[i] for i in sorted(order[start::experts])] for start in range(experts)]
