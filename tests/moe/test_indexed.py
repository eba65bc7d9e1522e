"""Experts that are index sets into the dense FFN, against the same experts as tensors of their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dive.config import (
    Compensation,
    Freezing,
    FreezingConfig,
    LoRAConfig,
    Metric,
    MoEConfig,
    PlainConfig,
    PruningConfig,
)
from dive.errors import UserError
from dive.model.families import ffn, moe_block
from dive.moe.assemble import assemble, assemble_indexed
from dive.moe.build import build_layers
from dive.moe.indexed import GatheredLinear
from dive.moe.layer import ExpertLayer
from dive.moe.plug import plug_routers
from dive.pruning.calibrate import collect_statistics
from dive.retrain.freezing import apply_policy

POLICY = FreezingConfig(router=Freezing.full, experts=Freezing.lora, norms=Freezing.full)


@pytest.fixture
def make(build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor]) -> Callable[..., Any]:
    def make(variant: str, compensation: Compensation) -> tuple[PreTrainedModel, list[ExpertLayer]]:
        model = build(variant)
        found = collect_statistics(
            model, {"a": tokens(3, 16), "b": tokens(3, 16, seed=1)}, second_moments=True, inputs=32
        )
        pruning = PruningConfig(metric=Metric.wifv, ratio=0.5, compensation=compensation)
        moe = MoEConfig(experts=2, plain=PlainConfig())
        return model, list(build_layers(model, list(found.values()), pruning, moe, seed=0))

    return make


def test_gathered_product_and_its_gradient_by_autograd() -> None:
    torch.manual_seed(0)
    matrix, index = torch.randn(6, 4, dtype=torch.float64), torch.tensor([[0, 2, 5], [1, 2, 3]])
    offsets = torch.tensor([3, 5], dtype=torch.int32)
    for transposed, width in ((False, 4), (True, 3)):
        rows = torch.randn(5, width, dtype=torch.float64, requires_grad=True)
        weight = matrix[index].transpose(1, 2) if transposed else matrix[index]
        wanted = torch.cat([rows[:3] @ weight[0].T, rows[3:] @ weight[1].T])
        found = GatheredLinear.apply(rows, matrix, index, offsets, transposed)
        torch.testing.assert_close(found, wanted)
        seed = torch.randn_like(wanted)
        one, other = (torch.autograd.grad(y, rows, seed)[0] for y in (found, wanted))
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen3"])
@pytest.mark.parametrize("compensation", list(Compensation))
def test_same_loss_and_gradients_as_materialised(
    make: Callable[..., Any], variant: str, compensation: Compensation, tokens: Callable[..., Tensor]
) -> None:
    dense, layers = make(variant, compensation)
    ids = tokens(3, 11)
    found = []
    for build in (assemble, assemble_indexed):
        moe = build(dense, layers, top_k=1)
        plug_routers(moe)
        torch.manual_seed(0)
        apply_policy(moe, POLICY, LoRAConfig(rank=4, alpha=8.0))
        for name, parameter in moe.named_parameters():
            if name.endswith(".b") and "lora" in name:
                nn.init.normal_(parameter, std=0.1)
        loss = moe(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss, {n: p.grad for n, p in moe.named_parameters() if p.requires_grad}))
    (one, ours), (other, theirs) = found
    torch.testing.assert_close(one, other)
    assert list(ours) == list(theirs)
    for name, gradient in ours.items():
        assert (gradient is None) == (theirs[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=5e-7)


def test_what_is_the_dense_models_and_what_is_not(make: Callable[..., Any]) -> None:
    for compensation, own_down in ((Compensation.least_squares, True), (Compensation.none, False)):
        dense, layers = make("llama", compensation)
        moe = assemble_indexed(dense, layers, top_k=1)
        for number in range(len(layers)):
            experts, weights = moe_block(moe, number).experts, ffn(dense, number)
            assert experts.gate.data_ptr() == weights.gate.data_ptr()
            assert experts.up.data_ptr() == weights.up.data_ptr()
            assert hasattr(experts, "down_proj") is own_down
            if not own_down:
                assert experts.down.data_ptr() == weights.down.data_ptr()


def test_experts_with_weights_of_their_own_are_refused(make: Callable[..., Any]) -> None:
    dense, layers = make("llama", Compensation.none)
    layers[1].gate_up[0, 0, 0] += 1.0
    with pytest.raises(UserError, match=r"retrain\.storage=indexed.*retrain\.storage=materialised"):
        assemble_indexed(dense, layers, top_k=1)
