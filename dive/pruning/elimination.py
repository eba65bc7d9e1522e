"""Removing channels one after another while the others make up for them (OBS).

Shapes: D hidden width, F channels, W kept channels.
"""

import torch
from torch import Tensor


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
    """
    gram = second_moment.to(down.device).double().clone()
    mean = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    strength = torch.zeros_like(mean)
    # Channels that never fire, or tokens fewer than channels, leave a singular system: then the smallest ridge that mends it.
    for share in (ridge, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5):
        gram.diagonal().add_(max(share, ridge) * mean - strength)
        strength = max(share, ridge) * mean
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed) == 0:
            break
    inverse = torch.cholesky_inverse(factor)
    weights = down.double()
    if cross is not None:
        weights = (cross.to(down.device).double() + strength * weights) @ inverse
    else:
        weights = weights.clone()
    kept = torch.ones(len(gram), dtype=torch.bool, device=down.device)
    remaining = len(gram)
    tiny = torch.finfo(torch.float64).tiny
    while remaining > width:
        scores = weights.square().sum(dim=0) / inverse.diagonal().clamp_min(tiny)
        scores[~kept] = torch.inf
        if always is not None:
            scores[always.to(scores.device)] = torch.inf
        count = min(block, remaining - width)
        gone = torch.argsort(scores, stable=True)[:count]
        rows = inverse[gone]
        update = torch.linalg.solve(rows[:, gone], rows)
        weights -= weights[:, gone] @ update
        inverse -= rows.T @ update
        weights[:, gone] = 0.0
        kept[gone] = False
        remaining -= count
    return kept.cpu()
