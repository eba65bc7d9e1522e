"""Importance scores and masks, worked out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import dive
from dive.config import Metric
from dive.errors import UserError
from dive.model.families import FFN
from dive.pruning.metrics import importance, keep_highest
from dive.pruning.statistics import ChannelStatistics, batch_statistics

# Three channels over three tokens. Means 2, 0, 5; unbiased variances (1 + 0 + 1) / 2 = 1, (9 + 9) / 2 = 9, 0;
# mean squares (1 + 4 + 9) / 3 = 14/3, (9 + 9) / 3 = 6, 25.
ACTIVATIONS = torch.tensor([[1.0, -3.0, 5.0], [2.0, 0.0, 5.0], [3.0, 3.0, 5.0]])
WEIGHTS = FFN(
    gate=torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
    up=torch.tensor([[0.0, 1.0], [2.0, 2.0], [3.0, 0.0]]),
    down=torch.tensor([[3.0, -1.0, 0.5], [-4.0, 1.0, 1.5]]),
    act=nn.SiLU(),
)


@pytest.mark.parametrize(
    ("metric", "scores"),
    [
        # Σ_d W² = 9 + 16, 1 + 1, 0.25 + 2.25
        (Metric.wifv, [1 * 25.0, 9 * 2.0, 0 * 2.5]),
        (Metric.ifv, [1.0, 9.0, 0.0]),
        # mean |W| = 3.5, 1, 1
        (Metric.wifn, [3.5 * (14 / 3) ** 0.5, 1 * 6**0.5, 1 * 5.0]),
        # gate² + up² + down²: 4 + 1 + 25, 1 + 8 + 2, 2 + 9 + 2.5
        (Metric.magnitude, [30**0.5, 11**0.5, 13.5**0.5]),
    ],
    ids=lambda value: value.value if isinstance(value, Metric) else "",
)
def test_scores(metric: Metric, scores: list[float]) -> None:
    statistics = batch_statistics(ACTIVATIONS, second_moment=False, inputs=None)
    found = importance(metric, WEIGHTS, statistics)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(scores, rel=1e-6)


def test_random_scores_follow_the_seed() -> None:
    statistics = batch_statistics(ACTIVATIONS, second_moment=False, inputs=None)
    one, again, other = (importance(Metric.random, WEIGHTS, statistics, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("scores", "width", "kept"),
    [
        ([0.1, 0.4, 0.3, 0.2], 2, [1, 2]),
        ([1.0, 2.0, 2.0, 2.0], 2, [1, 2]),  # ties go to the lower index
        ([0.0, 0.0, 0.0, 0.0], 3, [0, 1, 2]),
        ([-1.0, -3.0, -2.0, -4.0], 1, [0]),
        ([1.0, 0.0] * 50_000, 3, [0, 2, 4]),  # many ties: an unstable sort would show
    ],
)
def test_the_highest_stay(scores: list[float], width: int, kept: list[int]) -> None:
    assert keep_highest(torch.tensor(scores), width).nonzero().flatten().tolist() == kept


@pytest.fixture(scope="module")
def model_and_statistics(
    build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor]
) -> tuple[PreTrainedModel, ChannelStatistics]:
    model = build()
    return model, dive.collect_statistics(model, {"a": tokens(4, 16)}, taylor=True)["a"]


@pytest.mark.parametrize(
    ("ratio", "multiple", "width"),
    [(0.5, 1, 24), (0.75, 1, 12), (0.2, 1, 38), (0.75, 8, 16), (0.5, 16, 32)],
    # 48 · 0.8 = 38.4 → 38; 12 / 8 = 1.5 → 2 · 8; 24 / 16 = 1.5 → 2 · 16
)
def test_every_layer_keeps_the_same_width(
    model_and_statistics: tuple[PreTrainedModel, ChannelStatistics], ratio: float, multiple: int, width: int
) -> None:
    masks = dive.keep_masks(*model_and_statistics, ratio=ratio, width_multiple=multiple)
    assert masks.shape == (2, 48)
    assert masks.sum(dim=1).tolist() == [width, width]


def test_masks_follow_the_scores_of_their_own_layer(
    model_and_statistics: tuple[PreTrainedModel, ChannelStatistics],
) -> None:
    model, statistics = model_and_statistics
    masks = dive.keep_masks(model, statistics, metric="ifv", ratio=0.5)
    for layer in range(2):
        variance = statistics.variance[layer]
        assert variance[masks[layer]].min() > variance[~masks[layer]].max()
    assert not torch.equal(masks[0], masks[1])


def test_every_metric_gives_other_masks(model_and_statistics: tuple[PreTrainedModel, ChannelStatistics]) -> None:
    masks = {metric: dive.keep_masks(*model_and_statistics, metric=metric, ratio=0.5) for metric in Metric}
    rows = {tuple(mask.flatten().tolist()) for mask in masks.values()}
    assert len(rows) == len(Metric)


@pytest.mark.parametrize(("ratio", "multiple"), [(1.0, 1), (0.99, 1), (0.01, 1), (0.5, 64), (0.9, 16)])
def test_a_width_of_nothing_or_everything_is_refused(
    model_and_statistics: tuple[PreTrainedModel, ChannelStatistics], ratio: float, multiple: int
) -> None:
    with pytest.raises(UserError, match=r"pruning\.ratio"):
        dive.keep_masks(*model_and_statistics, ratio=ratio, width_multiple=multiple)


def test_with_a_ratio_of_nothing_every_channel_stays(
    model_and_statistics: tuple[PreTrainedModel, ChannelStatistics],
) -> None:
    assert dive.keep_masks(*model_and_statistics, ratio=0.0).all()
