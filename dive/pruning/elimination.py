"""Removing channels one after another while the others make up for them (OBS).

Shapes: D hidden width, F channels, W kept channels.
"""

import torch
from torch import Tensor

from dive.errors import UserError

PANEL = 8
"""The inverse is brought up to date whenever this part of the channels, one in so many, is gone."""
RIDGES = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""What stands in for a ridge that leaves the system singular: the smallest larger one that mends it."""


def eliminate(
    down: Tensor,
    second_moment: Tensor,
    width: int,
    *,
    ridge: float,
    block: int = 16,
    cross: Tensor | None = None,
    always: Tensor | None = None,
) -> Tensor:
    """Channels that stay, (F,) bool, by Optimal Brain Surgeon (Hassibi and Stork 1992) on the layer's output.

    With G the second moment of the remaining channels, H = (G + λ I)⁻¹ and W their refitted weights, leaving out channel j
    and refitting the others adds ‖W_j‖² / H_jj to the squared error. The channels that add least go, ``block`` at a time,
    and both W and H are updated exactly: W −= W_B (H_BB)⁻¹ H_B, H −= H_:B (H_BB)⁻¹ H_B. All in float64.

    Args:
        down: W, (D, F).
        second_moment: G, (F, F), Σ x xᵀ over the calibration tokens.
        width: channels to keep.
        ridge: λ as a share of mean(diag G), see :func:`dive.pruning.compensation.least_squares`.
        block: channels removed between two updates; 1 is the exact greedy order.
        cross: Σ y xᵀ, (D, F), where the target y is another than W x.
        always: (F,) bool, channels that stay, ``width`` of them at most.

    Raises:
        UserError: the second moments are not finite, or no ridge of :data:`RIDGES` makes them positive definite.
    """
    gram = second_moment.to(down.device).double().clone()
    mean = gram.diagonal().mean()
    mean = torch.where(mean > 0, mean, 1.0)  # where no channel ever fires, the order is that of the weights
    factor, strength = _factor(gram, mean, ridge)
    inverse = torch.cholesky_inverse(factor)
    weights = down.double()
    if cross is not None:
        weights = (cross.to(down.device).double() + strength * weights) @ inverse
    else:
        weights = weights.clone()
    left = torch.arange(len(gram), device=down.device)
    bound = torch.zeros(len(gram), dtype=torch.bool, device=down.device) if always is None else always.to(down.device)
    # H is brought up to date, and rid of the channels that are gone, a panel of blocks at a time.
    while len(left) > width:
        size = min(block * max(len(left) // (PANEL * block), 1), len(left) - width)
        here = _panel(weights, inverse, size, block, bound[left])
        left, weights = left[here], weights.index_select(1, here)
        inverse = inverse.index_select(0, here).index_select(1, here)
    kept = torch.zeros(len(gram), dtype=torch.bool)
    kept[left.cpu()] = True
    return kept


def _panel(weights: Tensor, inverse: Tensor, size: int, block: int, always: Tensor) -> Tensor:
    """Numbers of the channels that are left after ``size`` of them went; ``weights`` and ``inverse`` become those of the others.

    Until the end H is the ``inverse`` less Rᵀ U, the rows of all blocks so far and what each took away: one large product in
    place of many thin ones, of which only the diagonal and the rows of the next block are wanted earlier.
    """
    tiny = torch.finfo(torch.float64).tiny
    here = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    diagonal = inverse.diagonal().clone()
    rows, updates = inverse.new_empty(2, size, len(inverse))
    for start in range(0, size, block):
        stop = min(start + block, size)
        scores = weights.square().sum(dim=0) / diagonal.clamp_min(tiny)
        gone = torch.argsort(scores.masked_fill_(~here | always, torch.inf), stable=True)[: stop - start]
        found = inverse[gone] - rows[:start, gone].T @ updates[:start]
        update = torch.linalg.solve(found[:, gone], found)
        torch.addmm(weights, weights[:, gone], update, alpha=-1.0, out=weights)
        diagonal -= (found * update).sum(dim=0)
        rows[start:stop], updates[start:stop] = found, update
        weights[:, gone] = 0.0
        here[gone] = False
    torch.addmm(inverse, rows.T, updates, alpha=-1.0, out=inverse)
    return here.nonzero().squeeze(1)


def _factor(gram: Tensor, mean: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """(Cholesky factor of G + λ I, λ), both float64; ``gram`` becomes that sum.

    Channels that never fire, or tokens fewer than channels, leave a singular system, and second moments of float32 may have
    negative eigenvalues: then λ is larger than asked for.
    """
    if not gram.isfinite().all():
        raise UserError(
            "pruning.metric=obs: the channels' second moments are not finite; set model.dtype=float32, or look at the weights"
        )
    strength = torch.zeros_like(mean)
    for share in (ridge, *(larger for larger in RIDGES if larger > ridge)):
        gram.diagonal().add_(share * mean - strength)
        strength = share * mean
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed) == 0:
            return factor, strength
    raise UserError(
        f"pruning.ridge ({ridge}): the channels' second moments cannot be inverted, with {max(ridge, RIDGES[-1])} no better; "
        "raise pruning.ridge, or set pruning.metric=wifv"
    )
