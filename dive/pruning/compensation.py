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


def least_squares(down: Tensor, second_moment: Tensor, mask: Tensor, *, ridge: float) -> Tensor:
    """Kept columns of ``down_proj``, refitted so that they give the dense layer's output, (D, W).

    Minimises E‖W x − W' x_S‖² + λ‖W' − W_S‖² over W', S the kept channels. With G = E[x xᵀ] the solution is
    W' = (W G[:, S] + λ W_S)(G[S, S] + λ I)⁻¹. The ridge draws towards the weights that were there, not towards zero,
    and λ = ``ridge`` · mean(diag G). Solved in float64.

    Args:
        down: W, (D, F).
        second_moment: (F, F), Σ x xᵀ over the calibration tokens; its scale cancels.
        mask: (F,) bool, true for the kept channels.
        ridge: dimensionless.
    """
    kept = mask.nonzero().squeeze(1).to(down.device)
    weights = down.double()
    moment = second_moment.to(down.device).double()
    strength = ridge * moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    gram = moment[kept][:, kept]
    gram.diagonal().add_(strength)
    target = weights @ moment[:, kept] + strength * weights[:, kept]
    # A channel that never fires leaves a singular system when ridge is 0: the pseudo-inverse then keeps it at zero.
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) == 0:
        solution = torch.cholesky_solve(target.T, factor).T
    else:
        solution = target @ torch.linalg.pinv(gram, hermitian=True)
    return solution.to(down.dtype)
