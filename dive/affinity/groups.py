"""Which domains make an expert together: mined, by importance, at random, or as given (DIVE, section 3.1)."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dive.affinity.grouping import (
    adjusted_rand_index,
    cluster_distances,
    distances,
    random_groups,
    similarity_distances,
)
from dive.affinity.matrix import cross_domain_perplexity
from dive.affinity.similarity import importance_similarity, overlap_similarity
from dive.config import Compensation, Config, Grouping, Linkage, Measure, Metric
from dive.model.recipe import Dense
from dive.pruning.calibrate import calibrate, read_statistics
from dive.pruning.metrics import importance_of_layers, keep_highest
from dive.pruning.statistics import ChannelStatistics
from dive.store import Artifact, HasStages, HasStore, Place, step, write_json
from dive.together import ranks, shared_step

log = logging.getLogger(__name__)

MATRIX = "matrix.json"


@shared_step("matrix", "how well each domain's channels serve every other domain")
def mine(
    place: Place,
    run: HasStore,
    batch: int,
    *,
    model: Dense,
    statistics: Artifact,
    measured: Mapping[str, Tensor],
    metric: Metric,
    width: int,
    bias: bool,
    dense_layers: Sequence[int],
    seed: int,
) -> None:
    """Perplexity of the model pruned on each domain, measured on every domain.

    Args:
        batch: sequences per forward pass.
        measured: {domain: (N, T) int64}, text to measure on.
        width: channels kept.
        bias: whether what is removed is made up for by its mean.
        dense_layers: which are not pruned.
        seed: of random scores.
    """
    found = read_statistics(statistics)
    masks = domain_masks(model, found, metric=metric, width=width, seed=seed)
    for mask in masks.values():
        mask[list(dense_layers)] = True
    means = {domain: s.mean for domain, s in found.items()} if bias else None
    matrix = cross_domain_perplexity(model.load(), measured, masks, means=means, batch=batch, ranks=ranks())
    if not place.writes:
        return
    write_json(place.directory / MATRIX, {"domains": list(masks), "perplexity": matrix.tolist()})


@step("similarity", "how alike the domains' channels are in importance")
def compare_importance(
    place: Place,
    run: HasStore,
    *,
    model: Dense,
    statistics: Artifact,
    metric: Metric,
    dense_layers: Sequence[int],
    seed: int,
) -> None:
    """Rank correlation of the importance of channels to every two domains."""
    found = read_statistics(statistics)
    scores = torch.stack([importance_of_layers(model.load(), s, metric, seed=seed) for s in found.values()])
    matrix = importance_similarity(_without(scores, dense_layers))
    write_json(place.directory / MATRIX, {"domains": list(found), "similarity": matrix.tolist()})


@step("similarity", "how many channels the domains' masks share")
def compare_masks(
    place: Place,
    run: HasStore,
    *,
    model: Dense,
    statistics: Artifact,
    metric: Metric,
    width: int,
    dense_layers: Sequence[int],
    seed: int,
) -> None:
    """Overlap of the channels kept for every two domains."""
    found = read_statistics(statistics)
    masks = domain_masks(model, found, metric=metric, width=width, seed=seed)
    matrix = overlap_similarity(_without(torch.stack(list(masks.values())), dense_layers))
    write_json(place.directory / MATRIX, {"domains": list(found), "similarity": matrix.tolist()})


def _without(of_layers: Tensor, dense_layers: Sequence[int]) -> Tensor:
    """(n, L, F) of the layers that do not stay dense."""
    return of_layers[:, [number for number in range(of_layers.shape[1]) if number not in dense_layers]]


@step("groups", "groups of domains")
def group(place: Place, run: HasStore, *, matrix: Artifact, experts: int, linkage: Linkage) -> None:
    """Groups of domains by hierarchical clustering of the matrix of :func:`mine` or of a comparison."""
    mined = matrix.read(MATRIX)
    by_perplexity = "perplexity" in mined
    distance = distances(mined["perplexity"]) if by_perplexity else similarity_distances(mined["similarity"])
    found = cluster_distances(distance, mined["domains"], experts=experts, method=linkage)
    write_json(
        place.directory / "groups.json",
        {
            "groups": found.groups,
            "tree": found.tree.tolist(),
            "cophenetic": found.cophenetic,
            "silhouette": found.silhouette,
        },
    )


def domain_masks(
    model: Dense, statistics: Mapping[str, ChannelStatistics], *, metric: Metric, width: int, seed: int
) -> dict[str, Tensor]:
    """{domain: (L, F) bool}, the ``width`` most important channels of every layer for each domain."""
    scores = {
        domain: importance_of_layers(model.load(), s, metric, seed=seed + number)
        for number, (domain, s) in enumerate(statistics.items())
    }
    return {
        domain: torch.stack([keep_highest(layer, width) for layer in of_layers]) for domain, of_layers in scores.items()
    }


@dataclass(frozen=True, slots=True)
class Groups:
    """The domains that each expert begins with."""

    members: list[list[str]]
    """One list an expert; one of all domains where experts do not begin with groups."""
    clustering: dict[str, Any] | None = None
    """Mined groups, whether experts begin with them or not: matrix, tree, quality, measure, and ``agreement``, the adjusted Rand
    index between these groups and those by the other measures; seconds."""

    def together(self) -> list[list[str]]:
        """All domains as one group."""
        return [[domain for group in self.members for domain in group]]

    def dealt(self) -> list[str]:
        """The first domain of each group, then the second of each, and so on."""
        return [domain for row in itertools.zip_longest(*self.members) for domain in row if domain is not None]


def choose_groups(
    run: HasStages,
    config: Config,
    model: Dense,
    tokens: Mapping[str, Tensor],
    measured: Mapping[str, Tensor],
) -> Groups:
    """The groups that the configuration asks for.

    Args:
        tokens: {domain: (N, T) int64} for calibration.
        measured: {domain: (N, T) int64}, other text of the domains, to measure pruned models on.
    """
    if config.grouping is Grouping.mined:
        return mined_groups(run, config, model, tokens, measured)
    names, members = list(tokens), [list(tokens)]
    if config.grouping is Grouping.random:
        members = random_groups(names, experts=config.moe.experts, seed=config.seed)
    elif config.grouping is not None:
        members = given_groups(config.affinity.groups or [], names)
    return Groups(members, map_domains(run, config, model, tokens) if config.maps and len(names) > 2 else None)


def given_groups(groups: Sequence[Sequence[str]], names: Sequence[str]) -> list[list[str]]:
    """Those of the groups' domains that are here; what is missing on either side is logged."""
    found = [[domain for domain in members if domain in names] for members in groups]
    absent = [domain for members in groups for domain in members if domain not in names]
    unused = [domain for domain in names if not any(domain in members for members in found)]
    if absent or unused:
        log.warning("affinity.groups: not here %s; in no group %s", absent or "none", unused or "none")
    return found


def mined_groups(
    run: HasStages,
    config: Config,
    model: Dense,
    tokens: Mapping[str, Tensor],
    measured: Mapping[str, Tensor],
) -> Groups:
    """Groups by the chosen measure, and how far the others agree with it.

    The measures that need statistics alone are always taken, cross-domain perplexity if it is the chosen one or in the store.
    """
    pruning, batch = config.pruning, config.calibration_domains.batch
    metric, chosen = pruning.score_metric, config.affinity.measure
    with run.stage("calibration"):
        statistics = calibrate(run, batch, model=model, tokens=tokens, taylor=metric is Metric.taylor)
    scored = _scored(config, model, statistics, metric)
    costly = scored | {
        "width": pruning.width(model.channels),
        "measured": measured,
        "bias": pruning.compensation is not Compensation.none,
    }
    with run.stage("mining"):
        mined = mine(run, batch, **costly) if chosen is Measure.perplexity else mine.find(run, **costly)
        found = _clustered(run, config, model, scored, mined, chosen=chosen, groups=config.moe.experts)
    found["seconds"] += statistics.seconds
    return Groups(found["groups"], found)


def map_domains(run: HasStages, config: Config, model: Dense, tokens: Mapping[str, Tensor]) -> dict[str, Any]:
    """Groups that importance would make, where experts begin otherwise: to be looked at beside what the experts serve.

    From ``affinity.mapped`` calibration tokens of each domain, by FLAP's score, which needs their statistics alone.
    """
    few = {}
    for domain, matrix in tokens.items():
        sequences, length = config.affinity.mapped_of(*matrix.shape)
        few[domain] = matrix[:sequences, :length]
    with run.stage("mining"):
        statistics = calibrate(run, config.calibration_domains.batch, model=model, tokens=few, taylor=False)
        scored = _scored(config, model, statistics, Metric.wifv)
        groups = min(config.moe.experts, len(few))
        found = _clustered(run, config, model, scored, None, chosen=Measure.importance, groups=groups)
    found["seconds"] += statistics.seconds
    return found


def _scored(config: Config, model: Dense, statistics: Artifact, metric: Metric) -> dict[str, Any]:
    """What every measure is taken of."""
    seed = config.seed if metric is Metric.random else 0
    dense_layers = sorted(config.moe.dense_layers)
    return {"model": model, "statistics": statistics, "metric": metric, "dense_layers": dense_layers, "seed": seed}


def _clustered(
    run: HasStages,
    config: Config,
    model: Dense,
    scored: Mapping[str, Any],
    mined: Artifact | None,
    *,
    chosen: Measure,
    groups: int,
) -> dict[str, Any]:
    """:attr:`Groups.clustering` by the chosen measure; the seconds are those of its matrix.

    Args:
        mined: of :func:`mine`, if there is one.
    """
    matrices = {
        Measure.perplexity: mined,
        Measure.importance: compare_importance(run, **scored),
        Measure.mask_overlap: compare_masks(run, **scored, width=config.pruning.width(model.channels)),
    }
    found: dict[Measure, dict[str, Any]] = {
        measure: group(run, matrix=matrix, experts=groups, linkage=config.affinity.linkage).read("groups.json")
        for measure, matrix in matrices.items()
        if matrix is not None
    }
    matrix = matrices[chosen]
    assert matrix is not None
    agreement = {
        measure.value: adjusted_rand_index(found[chosen]["groups"], other["groups"])
        for measure, other in found.items()
        if measure is not chosen
    }
    about = {"measure": chosen.value, "agreement": agreement, "seconds": matrix.seconds}
    return {**found[chosen], **matrix.read(MATRIX), **about}
