"""Penalties by hand."""

import math

import pytest
import torch

from dive.moe.balance import overload, z_loss


def test_overload_by_hand() -> None:
    # 4 tokens, 2 experts: 3 go to expert 0, so its load over the mean is 1.5, and the other's 0.5.
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    chosen = torch.tensor([[0], [0], [0], [1]])
    # (1.5 − 1.2) · 2 · mean 0.65
    assert float(overload(probabilities, chosen, max_load=1.2)) == pytest.approx(0.3 * 2 * 0.65)
    assert float(overload(probabilities, chosen, max_load=1.5)) == 0.0


def test_overload_pushes_tokens_away_from_the_busy_expert_alone() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 6, requires_grad=True)
    probabilities = torch.softmax(logits, dim=-1)
    overload(probabilities, probabilities.argmax(dim=-1, keepdim=True), max_load=1.5).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), math.log(5.0)]])
    assert float(z_loss(logits)) == pytest.approx((math.log(2) ** 2 + math.log(8) ** 2) / 2)
