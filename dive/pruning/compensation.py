"""What makes up for removed channels: a bias (FLAP), or a refit of the kept columns.

Shapes: D hidden width, F channels, W kept channels.
"""

import torch
from torch import Tensor


def bias(down: Tensor, mean: Tensor, mask: Tensor) -> Tensor:
    """FLAP's bias W (X̄ ⊙ removed), (D,) (arXiv 2312.11983, eq. 4).

    Args:
        down: W, (D, F).
        mean: X̄, (F,), mean activation over the calibration tokens.
        mask: (F,) bool, true for the kept channels.
    """
    removed = (~mask).to(down.device)
    return down[:, removed] @ mean.to(down)[removed]


RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""What :func:`choose_ridge` chooses from."""


def least_squares(
    down: Tensor, second_moment: Tensor, mask: Tensor, *, ridge: float, cross: Tensor | None = None
) -> Tensor:
    """Kept columns of ``down_proj``, refitted so that they give the dense layer's output, (D, W).

    Minimises E‖y − W' x_S‖² + λ‖W' − W_S‖² over W', S the kept channels and y = W x unless ``cross`` says otherwise. With
    G = E[x xᵀ] and C = E[y xᵀ] the solution is W' = (C[:, S] + λ W_S)(G[S, S] + λ I)⁻¹. The ridge draws towards the
    weights that were there, not towards zero, and λ = ``ridge`` · mean(diag G). Solved in float64.

    Args:
        down: W, (D, F).
        second_moment: (F, F), Σ x xᵀ over the calibration tokens; its scale cancels.
        mask: (F,) bool, true for the kept channels.
        ridge: dimensionless.
        cross: C, (D, F), Σ y xᵀ over the same tokens; W G if none.
    """
    kept = mask.nonzero().squeeze(1).to(down.device)
    weights = down.double()
    moment = second_moment.to(down.device).double()
    strength = ridge * moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    gram = moment[kept][:, kept]
    gram.diagonal().add_(strength)
    wanted = weights @ moment[:, kept] if cross is None else cross.to(down.device).double()[:, kept]
    target = wanted + strength * weights[:, kept]
    # A channel that never fires leaves a singular system when ridge is 0: the pseudo-inverse then keeps it at zero.
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) == 0:
        solution = torch.cholesky_solve(target.T, factor).T
    else:
        solution = target @ torch.linalg.pinv(gram, hermitian=True)
    return solution.to(down.dtype)


def held_out(count: int) -> Tensor:
    """Which of so many sequences or tokens choose the ridge that the others are fitted with, (count,) bool: every fourth."""
    return torch.arange(count) % 4 == 3


def choose_ridge(
    down: Tensor,
    fit: Tensor,
    held_out: Tensor,
    mask: Tensor,
    *,
    cross: tuple[Tensor, Tensor] | None = None,
) -> float:
    """The ridge of :data:`RIDGES` whose refit on some tokens has the smallest squared error on others.

    The error is taken from moments alone: E‖y − W' x_S‖² = E‖y‖² − 2 tr(W' C_Sᵀ) + tr(W' G_SS W'ᵀ).

    Args:
        down: W, (D, F).
        fit: (F, F), second moment of the tokens that are fitted.
        held_out: (F, F), of the others.
        mask: (F,) bool, true for the kept channels.
        cross: Σ y xᵀ (D, F) of the two, where y is another than W x.
    """
    kept = mask.nonzero().squeeze(1).to(down.device)
    moment = held_out.to(down.device).double()
    wanted = down.double() @ moment[:, kept] if cross is None else cross[1].to(down.device).double()[:, kept]
    gram = moment[kept][:, kept]
    errors = []
    for ridge in RIDGES:
        refit = least_squares(down, fit, mask, ridge=ridge, cross=None if cross is None else cross[0]).double()
        errors.append(float(((refit @ gram - 2.0 * wanted) * refit).sum()))
    return RIDGES[errors.index(min(errors))]
