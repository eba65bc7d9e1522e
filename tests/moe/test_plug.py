"""What is plugged in for training leaves no trace when it is taken out again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM

from dive.api import reconstruct
from dive.config import Freezing, FreezingConfig, LoRAConfig
from dive.model.families import moe_block
from dive.moe.plug import LinearLoRA, plug_expert_lora, plug_linear_lora, plug_routers, routers, unplug
from dive.pruning.calibrate import collect_statistics
from dive.retrain.freezing import apply_policy

LORA = LoRAConfig(rank=4, alpha=8.0)


@pytest.fixture
def make_moe(build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor]) -> Callable[..., Any]:
    def make(variant: str = "llama", **settings: Any) -> PreTrainedModel:
        model = build(variant)
        statistics = collect_statistics(model, {"a": tokens(3, 16), "b": tokens(3, 16, seed=1)})
        return reconstruct(model, list(statistics.values()), **{"ratio": 0.5, "router_init": "random", **settings})

    return make


def snapshot(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def perturb_adapters(model: PreTrainedModel) -> None:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(".b") and "lora" in name:
            nn.init.normal_(parameter, std=0.1)


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize(
    ("variant", "stock"),
    [("llama", MixtralForCausalLM), ("llama-tied", MixtralForCausalLM), ("qwen3", Qwen3MoeForCausalLM)],
)
def test_plugged_and_unplugged_is_stock_again(
    make_moe: Callable[..., Any], variant: str, stock: type, tokens: Callable[..., Tensor]
) -> None:
    model = make_moe(variant, top_k=2)
    before, expected = snapshot(model), logits(model, tokens(2, 9))
    modules = {name: type(module) for name, module in model.named_modules()}
    plug_routers(model, noise=0.1)
    everything = FreezingConfig(
        router=Freezing.full, experts=Freezing.lora, norms=Freezing.full, attention=Freezing.lora
    )
    apply_policy(model, everything, LORA)
    assert len(routers(model)) == 2
    torch.testing.assert_close(logits(model, tokens(2, 9)), expected, rtol=1e-5, atol=1e-5)
    unplug(model)
    assert type(model) is stock
    assert {name: type(module) for name, module in model.named_modules()} == modules
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._experts_implementation == "grouped_mm"
    assert torch.equal(logits(model, tokens(2, 9)), expected)


def test_plugging_twice_changes_nothing(make_moe: Callable[..., Any]) -> None:
    model = make_moe()
    for _ in range(2):
        plug_routers(model, noise=0.1)
        plug_expert_lora(model, LORA)
        plug_linear_lora(model.lm_head, LORA)
        if not hasattr(model, "seen"):
            perturb_adapters(model)
            model.seen = snapshot(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, model.seen[name])
    assert len(model.lm_head._forward_hooks) == 1


def test_the_router_trains_the_stock_weight(make_moe: Callable[..., Any]) -> None:
    model = make_moe()
    weight = moe_block(model, 0).gate.weight
    plug_routers(model)
    assert routers(model)[0].weight is weight
    weight.data += 1.0
    unplug(model)
    assert moe_block(model, 0).gate.weight is weight


@pytest.mark.parametrize("part", ["experts", "attention", "embeddings", "head"])
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen3"])
def test_merged_adapters_equal_applied_ones(
    make_moe: Callable[..., Any], tokens: Callable[..., Tensor], variant: str, part: str
) -> None:
    model = make_moe(variant)
    ids = tokens(2, 9)
    plain = logits(model, ids)
    plug_routers(model)
    apply_policy(model, FreezingConfig(**{part: Freezing.lora}), LORA)
    perturb_adapters(model)
    applied = logits(model, ids)
    assert float((applied - plain).abs().max()) > 1e-2
    unplug(model)
    torch.testing.assert_close(logits(model, ids), applied, rtol=1e-3, atol=1e-3)
    assert not any("lora" in name for name in model.state_dict())


def test_linear_lora_by_hand() -> None:
    owner = nn.Linear(2, 3, bias=False)
    adapter = LinearLoRA(owner, LoRAConfig(rank=1, alpha=2.0))
    adapter.a.data = torch.tensor([[1.0, -1.0]])
    adapter.b.data = torch.tensor([[1.0], [2.0], [0.0]])
    # A x = 3 - 1 = 2; B · 2 · (alpha / rank = 2) = 4, 8, 0.
    assert adapter(torch.tensor([3.0, 1.0])).tolist() == [4.0, 8.0, 0.0]
    assert adapter.delta().tolist() == [[2.0, -2.0], [4.0, -4.0], [0.0, 0.0]]


def test_embedding_lora_by_hand() -> None:
    owner = nn.Embedding(3, 2)
    adapter = LinearLoRA(owner, LoRAConfig(rank=1, alpha=2.0))
    adapter.a.data = torch.tensor([[1.0, 5.0, -1.0]])
    adapter.b.data = torch.tensor([[1.0], [0.5]])
    assert adapter(torch.tensor([1, 2])).tolist() == [[10.0, 5.0], [-2.0, -1.0]]
    assert adapter.delta().tolist() == [[2.0, 1.0], [10.0, 5.0], [-2.0, -1.0]]


def test_biases_stay(make_moe: Callable[..., Any], tokens: Callable[..., Tensor]) -> None:
    model = make_moe(compensation="bias")
    ids = tokens(2, 9)
    expected = logits(model, ids)
    plug_expert_lora(model, LORA)
    unplug(model)
    assert not routers(model)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
    assert all(hasattr(moe_block(model, layer).experts, "down_bias") for layer in range(2))


@pytest.mark.parametrize("training", [True, False])
def test_what_is_plugged_in_is_in_the_models_mode(make_moe: Callable[..., Any], training: bool) -> None:
    model = make_moe().train(training)
    plug_routers(model, noise=0.1)
    apply_policy(
        model,
        FreezingConfig(experts=Freezing.lora, attention=Freezing.lora, head=Freezing.lora),
        LoRAConfig(dropout=0.1),
    )
    assert {module.training for module in model.modules()} == {training}
