"""Elimination against an exhaustive reference."""

import pytest
import torch
from torch import Tensor

from dive.config import Metric, PruningConfig
from dive.errors import UserError
from dive.model.families import FFN
from dive.pruning.elimination import eliminate
from dive.pruning.metrics import choose_channels
from dive.pruning.statistics import batch_statistics

CHANNELS = 9


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    """(down (4, 9), activations (60, 9) with correlated channels), float64."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=generator, dtype=torch.float64)
    activations = torch.randn(60, CHANNELS, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(4, CHANNELS, generator=generator, dtype=torch.float64), activations


def error(activations: Tensor, target: Tensor, kept: list[int]) -> float:
    """Squared error of the best refit on these channels."""
    columns = activations[:, kept]
    refit = torch.linalg.lstsq(columns, target).solution
    return float((target - columns @ refit).square().sum())


def greedy(activations: Tensor, target: Tensor, width: int) -> list[int]:
    """Leave out the channel whose loss is refitted best, by solving every least-squares problem."""
    kept = list(range(activations.shape[1]))
    while len(kept) > width:
        gone = min(kept, key=lambda j: error(activations, target, [k for k in kept if k != j]))
        kept.remove(gone)
    return kept


@pytest.mark.parametrize("width", [1, 3, 5, 8])
def test_it_removes_what_an_exhaustive_search_removes(problem: tuple[Tensor, Tensor], width: int) -> None:
    down, activations = problem
    kept = eliminate(down, activations.T @ activations, width, ridge=0.0, block=1)
    assert kept.nonzero().squeeze(1).tolist() == greedy(activations, activations @ down.T, width)


def test_another_target_is_told_by_its_cross_moment(problem: tuple[Tensor, Tensor]) -> None:
    down, activations = problem
    target = (
        activations @ down.T + torch.randn(60, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 9
    )
    moment = activations.T @ activations
    kept = eliminate(down, moment, 3, ridge=0.0, block=1, cross=target.T @ activations)
    assert kept.nonzero().squeeze(1).tolist() == greedy(activations, target, 3)
    same = eliminate(down, moment, 3, ridge=0.1, cross=down @ moment)
    assert torch.equal(same, eliminate(down, moment, 3, ridge=0.1))


@pytest.mark.parametrize("block", [2, 3])
def test_a_block_comes_close_to_one_at_a_time(problem: tuple[Tensor, Tensor], block: int) -> None:
    down, activations = problem
    kept = eliminate(down, activations.T @ activations, 5, ridge=0.0, block=block)
    assert int(kept.sum()) == 5
    target = activations @ down.T
    best = error(activations, target, greedy(activations, target, 5))
    lowest = eliminate(down, torch.eye(CHANNELS), 5, ridge=0.0)  # by the size of the weights alone
    assert error(activations, target, kept.nonzero().squeeze(1).tolist()) < 2.0 * best
    assert best < error(activations, target, lowest.nonzero().squeeze(1).tolist())


def test_a_copy_of_another_channel_goes_and_costs_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    activations = torch.randn(50, 4, generator=generator)
    activations = torch.cat([activations, 2.0 * activations[:, :1]], dim=1)  # channel 4 = 2 × channel 0
    down = torch.full((3, 5), 1.0)
    kept = eliminate(down, activations.T @ activations, 4, ridge=1e-9, block=1)
    assert sorted((~kept).nonzero().squeeze(1).tolist()) in ([0], [4])


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_channels_that_never_fire_go_first(problem: tuple[Tensor, Tensor], ridge: float) -> None:
    down, activations = problem
    activations[:, [2, 6]] = 0.0
    kept = eliminate(down, activations.T @ activations, 7, ridge=ridge, block=1)
    assert (~kept).nonzero().squeeze(1).tolist() == [2, 6]


def test_it_is_a_metric_that_needs_second_moments(problem: tuple[Tensor, Tensor]) -> None:
    down, activations = problem
    weights = FFN(torch.zeros(CHANNELS, 4), torch.zeros(CHANNELS, 4), down, torch.nn.SiLU())
    pruning = PruningConfig(metric=Metric.obs, ratio=0.5, width_multiple=1, obs_block=1)
    found = batch_statistics(activations, second_moment=True, inputs=None)
    expected = eliminate(down, (activations.float().T @ activations.float()), 4, ridge=1e-3, block=1)
    assert torch.equal(choose_channels(pruning, weights, found, width=4, ridge=1e-3), expected)
    with pytest.raises(UserError, match="second_moments"):
        choose_channels(
            pruning, weights, batch_statistics(activations, second_moment=False, inputs=None), width=4, ridge=1e-3
        )


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_moments_that_rounding_made_indefinite_take_a_larger_ridge(
    problem: tuple[Tensor, Tensor], ridge: float
) -> None:
    down, activations = problem
    moment = activations.T @ activations
    values, vectors = torch.linalg.eigh(moment)
    values[:2] = -0.02 * moment.diagonal().mean()  # neither the ridge nor a hundred-thousandth mends it
    damaged = vectors @ values.diag() @ vectors.T
    kept = eliminate(down, damaged, 5, ridge=ridge, block=1)
    assert torch.equal(kept, eliminate(down, damaged, 5, ridge=0.1, block=1))
    target = activations @ down.T
    best = error(activations, target, greedy(activations, target, 5))
    assert error(activations, target, kept.nonzero().squeeze(1).tolist()) < 3.0 * best


def test_moments_that_no_ridge_mends_are_refused(problem: tuple[Tensor, Tensor]) -> None:
    down, activations = problem
    moment = activations.T @ activations
    with pytest.raises(
        UserError, match=r"^pruning\.ridge \(0\.01\): .*raise pruning\.ridge, or set pruning\.metric=wifv"
    ):
        eliminate(down, moment - 5.0 * moment.diagonal().max() * torch.eye(CHANNELS), 5, ridge=0.01)
    moment[2, 3] = torch.nan
    with pytest.raises(UserError, match=r"second moments are not finite; set model\.dtype=float32"):
        eliminate(down, moment, 5, ridge=0.01)


def test_where_no_channel_fires_the_largest_weights_stay(problem: tuple[Tensor, Tensor]) -> None:
    down, _ = problem
    kept = eliminate(down, torch.zeros(CHANNELS, CHANNELS), 4, ridge=0.01)
    assert torch.equal(kept, eliminate(down, torch.eye(CHANNELS), 4, ridge=0.0))
