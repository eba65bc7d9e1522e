"""Routers that start trained: each layer's router learns which expert comes closest to the dense FFN.

Shapes: T tokens, D hidden width, E experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dive.config import DistillationConfig
from dive.ranks import ALONE, Ranks


def expert_errors(
    inputs: Tensor, targets: Tensor, experts: Sequence[Callable[[Tensor], Tensor]], *, ranks: Ranks = ALONE
) -> Tensor:
    """‖y − expert_e(x)‖² of every token and expert, (T, E) float32.

    Args:
        inputs: FFN inputs x, (T, D).
        targets: y, what the dense FFN makes of them, (T, D).
        experts: the pruned FFNs, (t, D) to (t, D).
        ranks: the processes that compute together, which all are given the same; each runs the experts that it owns.
    """

    def errors_of(expert: int) -> Tensor:
        parts = zip(inputs.split(2048), targets.split(2048), strict=True)
        return torch.cat([(wanted - experts[expert](rows)).float().square().sum(dim=-1) for rows, wanted in parts])

    like = inputs.new_empty(len(inputs), dtype=torch.float32)
    return torch.stack(ranks.each(len(experts), errors_of, like), dim=-1)


def fit_router(
    inputs: Tensor, errors: Tensor, settings: DistillationConfig, *, seed: int, ranks: Ranks = ALONE
) -> Tensor:
    """Linear router (E, D) that sends tokens where the error is small.

    With p = softmax(router · x) and errors scaled by their mean, the first third of the steps minimises the
    cross-entropy of p against softmax(−error / temperature), each token weighted by what choosing well is worth to it
    (mean − smallest error). The rest minimises the expected error Σ_e p_e error_e itself, which has poor gradients at
    the start and the right optimum.

    Args:
        inputs: x, FFN inputs after the norm, (T, D).
        errors: of every token and expert, (T, E).
        seed: of the batches.
        ranks: the processes that fit together, which all are given the same; each takes its part of every batch.
    """
    scale = inputs.float().square().mean().sqrt().clamp_min(1e-12)
    rows = inputs.float() / scale
    relative = errors / errors.mean().clamp_min(1e-30)
    targets = torch.softmax(-relative / settings.temperature, dim=-1)
    worth = relative.mean(dim=-1) - relative.min(dim=-1).values + 1e-6
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(errors.shape[1], rows.shape[1], device=rows.device, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=settings.steps)
    with torch.enable_grad():
        for step in range(settings.steps):
            chosen = torch.randint(len(rows), (min(settings.batch, len(rows)),), generator=generator).to(rows.device)
            own = ranks.part(chosen)
            logits = rows.index_select(0, own) @ weight.T
            if step < settings.steps // 3:
                entropy = functional.cross_entropy(logits, targets.index_select(0, own), reduction="none")
                loss = (entropy * worth[own]).sum() / worth[chosen].sum()
            else:
                expected = (torch.softmax(logits, dim=-1) * relative.index_select(0, own)).sum(dim=-1)
                loss = expected.mean() if ranks.count == 1 else expected.sum() / len(chosen)
            optimiser.zero_grad()
            loss.backward()
            assert weight.grad is not None
            weight.grad = ranks.sum(weight.grad)
            optimiser.step()
            schedule.step()
    return ranks.from_owner(0, (weight.detach() / scale).to(inputs.dtype))
