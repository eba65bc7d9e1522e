"""Routers that start trained: each layer's router learns which expert comes closest to the dense FFN.

Shapes: T tokens, D hidden width, E experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dive.config import DistillationConfig


def expert_errors(
    inputs: Tensor, target: Callable[[Tensor], Tensor], experts: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """‖target(x) − expert_e(x)‖² of every token and expert, (T, E) float32.

    Args:
        inputs: FFN inputs x, (T, D).
        target: the dense FFN, (t, D) to (t, D).
        experts: the pruned FFNs, likewise.
    """
    chunks = []
    for rows in inputs.split(2048):
        wanted = target(rows)
        chunks.append(torch.stack([(wanted - expert(rows)).float().square().sum(dim=-1) for expert in experts], dim=-1))
    return torch.cat(chunks)


def soft_targets(errors: Tensor, temperature: float) -> Tensor:
    """softmax(−error / (temperature · the layer's mean error)) over experts, (T, E)."""
    return torch.softmax(-errors / (temperature * errors.mean()).clamp_min(1e-30), dim=-1)


def fit_router(inputs: Tensor, targets: Tensor, settings: DistillationConfig, *, seed: int) -> Tensor:
    """Linear router (E, D) whose softmax comes closest to ``targets`` in cross-entropy.

    Args:
        inputs: (T, D), after the norm.
        targets: (T, E), rows sum to one.
        seed: of the batches.
    """
    scale = inputs.float().square().mean().sqrt().clamp_min(1e-12)
    rows = inputs.float() / scale
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(targets.shape[1], rows.shape[1], device=rows.device, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=settings.steps)
    with torch.enable_grad():
        for _ in range(settings.steps):
            if len(rows) > settings.batch:
                chosen = torch.randint(len(rows), (settings.batch,), generator=generator).to(rows.device)
                batch, wanted = rows[chosen], targets[chosen]
            else:
                batch, wanted = rows, targets
            loss = functional.cross_entropy(batch @ weight.T, wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return (weight.detach() / scale).to(inputs.dtype)
