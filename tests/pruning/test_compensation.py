"""Bias and least squares, by hand and against numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dive.pruning.compensation import RIDGES, bias, choose_ridge, least_squares

DOWN = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """(down (5, 8), activations (40, 8) with correlated channels, mask of 5)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator)
    activations = torch.randn(40, 8, generator=generator) @ mixing + 0.5
    mask = torch.tensor([True, False, True, True, False, True, False, True])
    return torch.randn(5, 8, generator=generator), activations, mask


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        # Means 0.5, -1, 2; channels 0 and 2 removed: 1 · 0.5 + 3 · 2 = 6.5 and 4 · 0.5 + 6 · 2 = 14.
        ([False, True, False], [6.5, 14.0]),
        ([True, False, True], [-2.0, -5.0]),
        ([True, True, True], [0.0, 0.0]),
    ],
)
def test_bias_by_hand(mask: list[bool], expected: list[float]) -> None:
    found = bias(DOWN, torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), torch.tensor(mask))
    assert found.tolist() == expected
    assert found.dtype == DOWN.dtype


def test_least_squares_by_hand() -> None:
    # x2 = 2 x1 always, so the removed column folds into the kept one: 1 + 2 · 2 = 5 and 4 + 2 · 5 = 14.
    activations = torch.tensor([[1.0, 2.0], [-3.0, -6.0], [0.5, 1.0]])
    found = least_squares(DOWN[:, :2], activations.T @ activations, torch.tensor([True, False]), ridge=0.0)
    torch.testing.assert_close(found, torch.tensor([[5.0], [14.0]]))


def test_without_ridge_it_is_numpys_least_squares(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    down, activations, mask = problem
    found = least_squares(down, activations.T @ activations, mask, ridge=0.0)
    x = activations.double().numpy()
    expected = np.linalg.lstsq(x[:, mask], x @ down.double().numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_with_ridge_it_minimises_the_stated_objective(problem: tuple[Tensor, Tensor, Tensor], ridge: float) -> None:
    # ‖(W x − W' x_S)‖² + λ ‖W' − W_S‖² is a stacked least-squares problem in W' − W_S.
    down, activations, mask = problem
    x, w = activations.double().numpy(), down.double().numpy()
    strength = ridge * (x**2).sum(axis=0).mean()
    rest = x @ w.T - x[:, mask] @ w[:, mask].T
    stacked = np.vstack([x[:, mask], np.sqrt(strength) * np.eye(int(mask.sum()))])
    change = np.linalg.lstsq(stacked, np.vstack([rest, np.zeros((int(mask.sum()), 5))]), rcond=None)[0].T
    found = least_squares(down, activations.T @ activations, mask, ridge=ridge)
    np.testing.assert_allclose(found, w[:, mask] + change, rtol=1e-4, atol=1e-4)


def test_the_scale_of_the_moment_cancels(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    down, activations, mask = problem
    moment = activations.T @ activations
    torch.testing.assert_close(
        least_squares(down, moment, mask, ridge=0.1), least_squares(down, moment / 40, mask, ridge=0.1)
    )


def test_an_infinite_ridge_leaves_the_weights_as_they_were(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    down, activations, mask = problem
    found = least_squares(down, activations.T @ activations, mask, ridge=1e9)
    torch.testing.assert_close(found, down[:, mask], rtol=1e-6, atol=1e-6)


def test_independent_channels_are_left_alone() -> None:
    found = least_squares(DOWN, torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([True, False, True]), ridge=0.0)
    torch.testing.assert_close(found, DOWN[:, [0, 2]])


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_a_channel_that_never_fires_does_no_harm(problem: tuple[Tensor, Tensor, Tensor], ridge: float) -> None:
    down, activations, mask = problem
    activations = activations.clone()
    activations[:, 2] = 0.0  # kept
    found = least_squares(down, activations.T @ activations, mask, ridge=ridge)
    assert torch.isfinite(found).all()
    alive = mask.clone()
    alive[2] = False
    expected = least_squares(down, activations.T @ activations, alive, ridge=ridge)
    torch.testing.assert_close(found[:, [0, 2, 3, 4]], expected, rtol=1e-4, atol=1e-4)


def test_no_text_at_all_leaves_the_weights(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    down, _, mask = problem
    found = least_squares(down, torch.zeros(8, 8), mask, ridge=0.01)
    assert torch.isfinite(found).all()


def test_it_is_the_best_fit_and_better_than_the_bias(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    down, activations, mask = problem

    def error(columns: Tensor, shift: Tensor | float = 0.0) -> float:
        return float((activations @ down.T - activations[:, mask] @ columns.T - shift).square().sum())

    refitted = least_squares(down, activations.T @ activations, mask, ridge=0.0)
    best = error(refitted)
    assert best < error(down[:, mask], bias(down, activations.mean(dim=0), mask)) < error(down[:, mask])
    for column in range(refitted.shape[1]):
        moved = refitted.clone()
        moved[:, column] += 0.01
        assert error(moved) > best


def test_another_target_is_fitted_by_its_cross_moment(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    down, activations, mask = problem
    target = torch.randn(40, 5, generator=torch.Generator().manual_seed(3))
    found = least_squares(down, activations.T @ activations, mask, ridge=0.0, cross=target.T @ activations)
    expected, *_ = np.linalg.lstsq(activations[:, mask].double().numpy(), target.double().numpy(), rcond=None)
    np.testing.assert_allclose(found.numpy(), expected.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("crossed", [False, True])
def test_the_ridge_is_the_one_with_the_smallest_error_on_other_tokens(crossed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator)
    fit = torch.randn(14, 12, generator=generator) @ mixing  # hardly more tokens than channels: it over-fits
    other = torch.randn(300, 12, generator=generator) @ mixing
    down = torch.randn(5, 12, generator=generator)
    mask = torch.arange(12) % 3 != 0
    targets = [rows @ down.T + crossed * torch.randn(len(rows), 5, generator=generator) for rows in (fit, other)]
    cross = (targets[0].T @ fit, targets[1].T @ other) if crossed else None

    def error(ridge: float) -> float:
        refit = least_squares(down, fit.T @ fit, mask, ridge=ridge, cross=None if cross is None else cross[0])
        return float((targets[1] - other[:, mask] @ refit.T).square().sum())

    chosen = choose_ridge(down, fit.T @ fit, other.T @ other, mask, cross=cross)
    assert chosen == min(RIDGES, key=error)
    assert chosen != RIDGES[0]
