"""Distances to the teacher by hand, and tensors shared with it."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dive.api import reconstruct
from dive.config import Freezing, FreezingConfig, LoRAConfig
from dive.pruning.calibrate import collect_statistics
from dive.retrain.freezing import apply_policy
from dive.retrain.teacher import hidden_distance, logit_distance, share_frozen


def log(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def test_logit_distance_by_hand() -> None:
    # KL = 0.5 ln(0.5 / 0.25) + 0.3 ln(0.3 / 0.25) + 0.2 ln(0.2 / 0.5)
    expected = 0.5 * math.log(2) + 0.3 * math.log(1.2) + 0.2 * math.log(0.4)
    student, teacher = log(0.25, 0.25, 0.5), log(0.5, 0.3, 0.2)
    assert float(logit_distance(student, teacher, temperature=1.0, top_k=None)) == pytest.approx(expected, rel=1e-5)
    # The likeliest token and all others together: 0.5 ln 2 + 0.5 ln(0.5 / 0.75)
    coarse = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert float(logit_distance(student, teacher, temperature=1.0, top_k=1)) == pytest.approx(coarse, rel=1e-5)
    # T = 2 takes square roots: (√5, √3, √2) and (1, 1, √2), normalised; times T².
    ours, theirs = [1.0, 1.0, math.sqrt(2)], [math.sqrt(5), math.sqrt(3), math.sqrt(2)]
    ours, theirs = [x / sum(ours) for x in ours], [x / sum(theirs) for x in theirs]
    softened = 4.0 * sum(p * math.log(p / q) for p, q in zip(theirs, ours, strict=True))
    assert float(logit_distance(student, teacher, temperature=2.0, top_k=None)) == pytest.approx(softened, rel=1e-5)


def test_logit_distance_is_a_mean_over_tokens_and_zero_for_equals() -> None:
    student = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    for top_k in (None, 3, 10, 50):
        whole = logit_distance(student, teacher, temperature=1.5, top_k=top_k)
        single = [
            logit_distance(s[None], t[None], temperature=1.5, top_k=top_k)
            for s, t in zip(student, teacher, strict=True)
        ]
        torch.testing.assert_close(whole, torch.stack(single).mean())
        assert float(logit_distance(teacher, teacher, temperature=1.5, top_k=top_k)) == pytest.approx(0.0, abs=1e-5)


def test_the_gradient_vanishes_only_at_the_teacher() -> None:
    teacher = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    student = (teacher + 3.0).requires_grad_()  # the same distribution
    logit_distance(student, teacher, temperature=1.0, top_k=None).backward()
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6


def test_hidden_distance_by_hand() -> None:
    ours = [torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[0.0, 3.0]]])]
    theirs = [torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 1.0]]])]
    assert float(hidden_distance(ours, theirs)) == pytest.approx((1 / 5 + 4 / 1) / 2)


def test_hidden_distance_is_a_mean_over_sequences() -> None:
    ours = [torch.tensor([[[1.0, 1.0]], [[0.0, 3.0]]])]
    theirs = [torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]])]
    assert float(hidden_distance(ours, theirs)) == pytest.approx((1 / 5 + 4 / 1) / 2)  # and not (1 + 4) / (5 + 1)
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(4, 6, 8, generator=generator) for _ in range(3)]
    theirs = [scale * torch.randn(4, 6, 8, generator=generator) for scale in (1.0, 5.0, 0.1)]
    halves = [hidden_distance([h[part] for h in ours], [h[part] for h in theirs]) for part in (slice(2), slice(2, 4))]
    torch.testing.assert_close(torch.stack(halves).mean(), hidden_distance(ours, theirs))


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen3"])
def test_frozen_tensors_are_the_teachers(
    build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor], variant: str
) -> None:
    dense = build(variant)
    statistics = collect_statistics(dense, {"a": tokens(2, 16), "b": tokens(2, 16, seed=1)})
    moe = reconstruct(dense, list(statistics.values()), ratio=0.5, router_init="random")
    ids = tokens(1, 8)
    before = moe(input_ids=ids).logits
    apply_policy(moe, FreezingConfig(router=Freezing.full, norms=Freezing.full, experts=Freezing.lora), LoRAConfig())
    saved = share_frozen(dense, moe)
    theirs = dict(dense.named_parameters(remove_duplicate=False))
    shared = {n for n, p in moe.named_parameters() if n in theirs and p.data_ptr() == theirs[n].data_ptr()}
    assert "model.embed_tokens.weight" in shared
    assert "model.layers.1.self_attn.q_proj.weight" in shared
    assert not any("layernorm" in name for name in shared)  # trained: the teacher's must stay
    assert saved == sum(4 * theirs[name].numel() for name in shared)
    torch.testing.assert_close(moe(input_ids=ids).logits, before)  # adapters run by other code
