"""Routers that start trained: each layer's router learns which expert comes closest to the dense FFN.

Shapes: T tokens, D hidden width, E experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dive.config import DistillationConfig


def expert_errors(inputs: Tensor, targets: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """‖y − expert_e(x)‖² of every token and expert, (T, E) float32.

    Args:
        inputs: FFN inputs x, (T, D).
        targets: y, what the dense FFN makes of them, (T, D).
        experts: the pruned FFNs, (t, D) to (t, D).
    """
    chunks = []
    for rows, wanted in zip(inputs.split(2048), targets.split(2048), strict=True):
        chunks.append(torch.stack([(wanted - expert(rows)).float().square().sum(dim=-1) for expert in experts], dim=-1))
    return torch.cat(chunks)


def fit_router(inputs: Tensor, errors: Tensor, settings: DistillationConfig, *, seed: int) -> Tensor:
    """Linear router (E, D) that sends tokens where the error is small.

    With p = softmax(router · x) and errors scaled by their mean, the first third of the steps minimises the
    cross-entropy of p against softmax(−error / temperature), each token weighted by what choosing well is worth to it
    (mean − smallest error). The rest minimises the expected error Σ_e p_e error_e itself, which has poor gradients at
    the start and the right optimum.

    Args:
        inputs: x, FFN inputs after the norm, (T, D).
        errors: of every token and expert, (T, E).
        seed: of the batches.
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
            logits = rows.index_select(0, chosen) @ weight.T
            if step < settings.steps // 3:
                entropy = functional.cross_entropy(logits, targets.index_select(0, chosen), reduction="none")
                loss = (entropy * worth[chosen]).sum() / worth[chosen].sum()
            else:
                loss = (torch.softmax(logits, dim=-1) * relative.index_select(0, chosen)).sum(dim=-1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return (weight.detach() / scale).to(inputs.dtype)
