"""Experts of channels that fire together: counts, clusters and masks worked out by hand."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dive
from dive.config import CoactivationConfig, Compensation, MoEConfig, PlainConfig, PruningConfig, RouterInit
from dive.errors import UserError
from dive.model.families import ffn, moe_block
from dive.moe.assemble import assemble
from dive.moe.build import build_layers
from dive.moe.constructions.coactivation import balanced_clusters, coactivation_masks
from dive.moe.layer import ExpertLayer
from dive.pruning.metrics import importance, keep_highest
from dive.pruning.statistics import ChannelStatistics, batch_statistics

Build = Callable[..., PreTrainedModel]
Tokens = Callable[..., Tensor]

# Tokens on which four channels fire: 0 and 2 together, 1 and 3 together.
PATTERNS = torch.tensor([[1.0, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1]])


def test_coactivation_by_hand() -> None:
    channels = torch.tensor([[3.0, -4.0, 1.0], [0.0, 2.0, -5.0]])
    found = batch_statistics(channels, second_moment=False, inputs=None, active_channels=2).coactivation
    assert found is not None
    # The two largest in absolute value: 0 and 1 on the first token, 1 and 2 on the second.
    assert found[0].tolist() == [[1, 1, 0], [1, 2, 1], [0, 1, 1]]
    everything = batch_statistics(channels, second_moment=False, inputs=None, active_channels=99).coactivation
    assert everything is not None
    assert torch.equal(everything[0], torch.full((3, 3), 2.0))


def test_coactivation_adds_up(build: Build, tokens: Tokens) -> None:
    model = build()
    one, two = tokens(2, 8, seed=1), tokens(3, 8, seed=2)
    apart = dive.collect_statistics(model, {"one": one, "two": two}, active_channels=5)
    both = dive.collect_statistics(model, {"both": torch.cat([one, two])}, active_channels=5)["both"]
    assert both.coactivation is not None
    assert torch.equal((apart["one"] + apart["two"]).coactivation, both.coactivation)
    assert both.coactivation[1].diagonal().sum() == 5 * 40  # five channels on each token
    assert dive.collect_statistics(model, {"one": one})["one"].coactivation is None


def test_channels_that_fire_together_are_clustered() -> None:
    clusters = balanced_clusters((PATTERNS.T @ PATTERNS).numpy().astype(float), experts=2)
    assert clusters[0] == clusters[2] != clusters[1] == clusters[3]


def test_clusters_are_as_good_as_the_best_of_all_divisions() -> None:
    # Two groups of three channels in noise; every division into halves is tried.
    rng = np.random.default_rng(0)
    group = np.array([0, 1, 0, 1, 1, 0])
    topic = rng.integers(0, 2, 200)
    marks = (rng.random((200, 6)) < np.where(topic[:, None] == group, 0.8, 0.2)).astype(float)

    def spread(left: tuple[int, ...]) -> float:
        parts = (marks[:, list(left)], marks[:, [c for c in range(6) if c not in left]])
        return sum(((part - part.mean(axis=1, keepdims=True)) ** 2).sum() for part in parts)

    best = min(combinations(range(6), 3), key=spread)
    found = balanced_clusters(marks.T @ marks, experts=2)
    assert {tuple(np.flatnonzero(found == c)) for c in (0, 1)} == {best, tuple(set(range(6)) - set(best))}


@pytest.mark.parametrize(("n", "experts"), [(6, 4), (7, 3), (8, 8), (3, 5)])
def test_cluster_sizes_differ_by_at_most_one(n: int, experts: int) -> None:
    marks = np.random.default_rng(1).random((50, n)) < 0.3
    sizes = np.bincount(balanced_clusters(marks.T @ marks.astype(float), experts=experts), minlength=experts)
    assert sizes.sum() == n
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(
    ("width", "common", "uses"),
    [
        (12, 0, {1}),  # 4 · 12 = 48: each channel once
        (18, 8, {1, 4}),  # 4 · 10 = 48 - 8: the rest once, the common ones in all
        (8, 2, {0, 1, 4}),  # 4 · 6 < 46: some are left out
        (24, 6, {1, 2, 3, 4}),  # 4 · 18 > 42: some stand in several experts
    ],
)
def test_every_expert_has_its_width_and_the_common_channels(width: int, common: int, uses: set[int]) -> None:
    marks = (torch.rand(300, 48, generator=torch.Generator().manual_seed(0)) < torch.linspace(0.1, 0.9, 48)).float()
    weight = torch.rand(48, generator=torch.Generator().manual_seed(1))
    masks = coactivation_masks(marks.T @ marks, weight, experts=4, width=width, common=common)
    assert masks.sum(dim=1).tolist() == [width] * 4
    count = masks.sum(dim=0)
    assert set(count.tolist()) <= uses
    often = marks.sum(dim=0).topk(common).indices
    assert masks[:, often].all()
    if 0 in uses:
        rest = [c for c in range(48) if c not in often.tolist()]
        assert weight[rest][count[rest] == 0].max() < weight[rest][count[rest] == 1].min()
    else:
        assert int(count.min()) >= 1
    assert torch.equal(masks, coactivation_masks(marks.T @ marks, weight, experts=4, width=width, common=common))


def test_spare_places_go_to_the_channels_that_fire_most_often_with_the_experts_own() -> None:
    # Channel 2 fires with 0 on three tokens, 3 with 1 on two; width 3 leaves each expert one place beyond its own two.
    extra = torch.tensor([[1.0, 1, 0, 0]])  # 0 and 1 meet once; 2 and 3 never
    marks = torch.cat([PATTERNS, extra])
    masks = coactivation_masks(marks.T @ marks, torch.ones(4), experts=2, width=3, common=0)
    assert {tuple(mask.nonzero().squeeze(1).tolist()) for mask in masks} == {(0, 1, 2), (0, 1, 3)}


# ------------------------------------------------------------------------------------------------- in a layer


def statistics_of(model: PreTrainedModel, tokens: Tokens, count: int = 3) -> list[ChannelStatistics]:
    sets = {str(i): tokens(3, 16, seed=i) for i in range(count)}
    return list(dive.collect_statistics(model, sets, active_channels=10).values())


def constructed(model: PreTrainedModel, groups: list[ChannelStatistics], moe: MoEConfig, **pruning: Any) -> ExpertLayer:
    settings = PruningConfig(**{"ratio": 0.5, "width_multiple": 1, **pruning})
    return next(build_layers(model, groups, settings, moe, seed=0))


@pytest.mark.parametrize("top_k", [1, 2])
def test_common_channels_are_always_on_in_the_stock_model(build: Build, tokens: Tokens, top_k: int) -> None:
    # 20 common channels and 4 · 7 others divide 48: with all experts chosen at equal gates, the experts times E would add
    # up to the dense FFN. Here the router decides, so the reference sums what the chosen experts hold.
    model = build()
    groups = statistics_of(model, tokens)
    settings = CoactivationConfig(shared=20 / 27, router_init=RouterInit.random)
    moe = MoEConfig(experts=4, top_k=top_k, coactivation=settings)
    layer = constructed(model, groups, moe, ratio=21 / 48, compensation=Compensation.none)
    always = layer.masks.all(dim=0)
    assert int(always.sum()) == 20
    assert layer.masks.sum(dim=0).tolist() == [4 if common else 1 for common in always.tolist()]
    block = moe_block(assemble(model, [layer, layer], top_k=top_k), 0)
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    block.gate.weight.zero_()  # every gate is 1 / E before, 1 / K after the choice
    weights = ffn(model, 0)
    chosen = block.gate(rows)[2]
    expected = torch.stack(
        [
            weights.down @ torch.where(layer.masks[best].any(dim=0), weights.channels(row), torch.zeros(48))
            for row, best in zip(rows, chosen, strict=True)
        ]
    )
    torch.testing.assert_close(block(rows[None])[0], expected, rtol=1e-4, atol=1e-4)


def test_common_channels_of_domain_experts_are_those_of_the_union(build: Build, tokens: Tokens) -> None:
    model = build()
    groups = statistics_of(model, tokens)
    weights = ffn(model, 0)
    plain = constructed(model, groups, MoEConfig(experts=3, plain=PlainConfig()))
    layer = constructed(model, groups, MoEConfig(experts=3, plain=PlainConfig(shared=0.5)))
    union = groups[0] + groups[1] + groups[2]
    always = keep_highest(importance(PruningConfig().metric, weights, union.layer(0)), 12)
    assert layer.masks[:, always].all()
    for expert, group in enumerate(groups):
        own = importance(PruningConfig().metric, weights, group.layer(0))
        best = own.masked_fill(always, -1.0).topk(12).indices
        assert set(layer.masks[expert].nonzero().squeeze(1).tolist()) == set(best.tolist()) | set(
            always.nonzero().squeeze(1).tolist()
        )
    assert not torch.equal(plain.masks, layer.masks)
    assert plain.masks.sum(dim=1).tolist() == layer.masks.sum(dim=1).tolist() == [24] * 3


def test_what_lacks_or_contradicts_is_refused(build: Build, tokens: Tokens) -> None:
    model = build()
    bare = list(dive.collect_statistics(model, {"a": tokens(2, 8)}).values())
    with pytest.raises(UserError, match="needs co-activations"):
        constructed(model, bare, MoEConfig(experts=4, coactivation=CoactivationConfig()))
    with pytest.raises(UserError, match=r"moe\.plain\.shared \(1\.0\)"):
        MoEConfig(plain=PlainConfig(shared=1.0))


def test_one_expert_is_what_is_most_important(build: Build, tokens: Tokens) -> None:
    model = build()
    moe = MoEConfig(experts=1, coactivation=CoactivationConfig(shared=0.0))
    [layer, _] = build_layers(model, [tokens(3, 16)], PruningConfig(ratio=0.5), moe, seed=0)
    statistics = dive.collect_statistics(model, {"a": tokens(3, 16)})["a"]
    scores = importance(PruningConfig().metric, ffn(model, 0), statistics.layer(0))
    assert torch.equal(layer.masks[0], keep_highest(scores, 24))
