"""Losses that keep routers in bounds.

Shapes: T tokens, E experts, K experts a token.
"""

import torch
from torch import Tensor


def expert_load(chosen: Tensor, experts: int, weights: Tensor | None = None) -> Tensor:
    """How often each expert is chosen, (E,) float32; or the sum of the weights with which it is.

    Args:
        chosen: (T, K) int64.
        weights: (T, K).
    """
    # Not bincount: on CUDA the host waits for it, and no compiler sees through it. Sums of ones are exact in any order.
    added = torch.ones_like(chosen, dtype=torch.float32) if weights is None else weights.float()
    return torch.zeros(experts, dtype=torch.float32, device=chosen.device).scatter_add_(
        0, chosen.reshape(-1), added.reshape(-1)
    )


def overload(probabilities: Tensor, chosen: Tensor, *, max_load: float) -> Tensor:
    """Penalty on experts with more than ``max_load`` times the mean load; zero where there are none.

    Σ_e max(E f_e − max_load, 0) · E P_e with f_e the share of the selections and P_e the mean probability of expert e: the
    balance loss of Switch Transformers (arXiv 2101.03961, eq. 4), but of the overloaded experts alone, so that domains may
    keep experts of their own.

    Args:
        probabilities: (T, E), softmax over all experts.
        chosen: (T, K) int64.
    """
    experts = probabilities.shape[1]
    load = expert_load(chosen, experts) * (experts / chosen.numel())
    return ((load - max_load).clamp_min(0.0) * probabilities.mean(dim=0) * experts).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the router's logits (T, E) (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return torch.logsumexp(logits.float(), dim=-1).square().mean()
