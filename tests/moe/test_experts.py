"""Our experts forward against transformers' own, and low-rank adapters against merged weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dive.config import Gate
from dive.moe import experts as experts_module
from dive.moe.experts import GroupedLoRA, experts_forward
from dive.moe.router import Router

TOKENS, HIDDEN, EXPERTS = 12, 16, 4
PROJECTIONS = ("lora_gate", "lora_up", "lora_down")


def make_experts(family: str = "mixtral", *, width: int = 20, implementation: str = "eager") -> Any:
    if family == "mixtral":
        config: Any = MixtralConfig(hidden_size=HIDDEN, intermediate_size=width, num_local_experts=EXPERTS)
        config._experts_implementation = implementation
        module: Any = MixtralExperts(config)
    else:
        config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=width, num_experts=EXPERTS)
        config._experts_implementation = implementation
        module = Qwen3MoeExperts(config)
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def with_lora(module: Any, *, dropout: float = 0.0, spread: float | None = 0.2) -> Any:
    """Adapters with B drawn at random; as they are made (B zero) without a spread."""
    width, hidden = module.down_proj.shape[-1], module.down_proj.shape[1]
    for name, (inside, outside) in zip(PROJECTIONS, ((hidden, width), (hidden, width), (width, hidden)), strict=True):
        adapter = GroupedLoRA(module.down_proj, EXPERTS, inside, outside, rank=4, alpha=8.0, dropout=dropout)
        if spread is not None:
            nn.init.normal_(adapter.b, std=spread)
        setattr(module, name, adapter)
    return module


def selection(top_k: int, *, among: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden (T, D), experts (T, K), gates (T, K))"""
    torch.manual_seed(1)
    chosen = torch.stack([torch.randperm(among)[:top_k] for _ in range(TOKENS)])
    return torch.randn(TOKENS, HIDDEN), chosen, torch.rand(TOKENS, top_k)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_without_adapters_it_is_eager(family: str, top_k: int) -> None:
    module = make_experts(family)
    torch.testing.assert_close(
        experts_forward(module, *selection(top_k)), module(*selection(top_k)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_without_adapters_it_is_grouped_mm(family: str, top_k: int) -> None:
    module = make_experts(family, implementation="grouped_mm")
    torch.testing.assert_close(
        experts_forward(module, *selection(top_k)), module(*selection(top_k)), rtol=1e-6, atol=1e-6
    )


def test_transformers_finds_it_by_name() -> None:
    experts_module.register()
    module = with_lora(make_experts(implementation=experts_module.IMPLEMENTATION))
    torch.testing.assert_close(module(*selection(2)), experts_forward(module, *selection(2)))


@pytest.mark.parametrize("width", [1, 5, 13, 20])
def test_any_width(width: int) -> None:
    module = make_experts(width=width)
    torch.testing.assert_close(experts_forward(module, *selection(2)), module(*selection(2)), rtol=1e-5, atol=1e-5)


def test_experts_that_nobody_selects_are_skipped() -> None:
    module = make_experts()
    arguments = selection(1, among=2)
    before = experts_forward(module, *arguments)
    with torch.no_grad():
        module.gate_up_proj[2:] = torch.nan
        module.down_proj[2:] = torch.nan
    assert torch.equal(experts_forward(module, *arguments), before)


def test_gradients_are_those_of_eager() -> None:
    ours, stock = make_experts(), make_experts()
    for module, forward in ((ours, experts_forward), (stock, lambda m, *a: m(*a))):
        hidden, chosen, gates = selection(2)
        module.seen = hidden.requires_grad_(), gates.requires_grad_()
        forward(module, hidden, chosen, gates).square().sum().backward()
    for one, other in zip((*ours.parameters(), *ours.seen), (*stock.parameters(), *stock.seen), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_lora_by_hand() -> None:
    adapter = GroupedLoRA(torch.empty(1), 2, 2, 2, rank=1, alpha=3.0, dropout=0.0)
    adapter.a.data = torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]])
    adapter.b.data = torch.tensor([[[1.0], [-1.0]], [[2.0], [0.5]]])
    # Expert 0: A x = 1 + 2 = 3, B · 3 · (alpha / rank = 3) = 9, -9. Expert 1: A x = 1, → 6, 1.5.
    found = adapter(torch.ones(2, 2), torch.tensor([1, 2], dtype=torch.int32))
    assert found.tolist() == [[9.0, -9.0], [6.0, 1.5]]
    assert adapter.delta().tolist() == [[[3.0, 6.0], [-3.0, -6.0]], [[0.0, 6.0], [0.0, 1.5]]]


def test_fresh_adapters_change_nothing() -> None:
    module = make_experts()
    before = experts_forward(module, *selection(2))
    with_lora(module, spread=None)
    torch.testing.assert_close(experts_forward(module, *selection(2)), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_merged_adapters_equal_applied_ones(top_k: int) -> None:
    module = with_lora(make_experts())
    merged = make_experts()
    with torch.no_grad():
        merged.gate_up_proj += torch.cat([module.lora_gate.delta(), module.lora_up.delta()], dim=1)
        merged.down_proj += module.lora_down.delta()
    applied = experts_forward(module, *selection(top_k))
    torch.testing.assert_close(applied, merged(*selection(top_k)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(applied, make_experts()(*selection(top_k)), atol=1e-2)


def test_only_selected_experts_get_gradients() -> None:
    module = with_lora(make_experts())
    hidden, chosen, gates = selection(2, among=3)
    assert set(chosen.flatten().tolist()) == {0, 1, 2}
    experts_forward(module, hidden, chosen, gates).square().sum().backward()
    for name in PROJECTIONS:
        for parameter in getattr(module, name).parameters():
            reached = parameter.grad.flatten(1).abs().sum(dim=1) > 0
            assert reached.tolist() == [True, True, True, False]


def test_dropout_in_training_only() -> None:
    module = with_lora(make_experts(), dropout=0.5)
    arguments = selection(1)
    assert not torch.equal(experts_forward(module.train(), *arguments), experts_forward(module, *arguments))
    assert torch.equal(experts_forward(module.eval(), *arguments), experts_forward(module, *arguments))


def test_bias_by_hand() -> None:
    module = make_experts()
    plain = experts_forward(module, *selection(2))
    biased = copy.deepcopy(module)
    biased.down_bias = nn.Parameter(torch.arange(EXPERTS * HIDDEN, dtype=torch.float32).view(EXPERTS, HIDDEN))
    _, chosen, gates = selection(2)
    shift = (gates[:, :, None] * biased.down_bias[chosen]).sum(dim=1)
    torch.testing.assert_close(experts_forward(biased, *selection(2)), plain + shift, rtol=1e-5, atol=1e-4)


def test_pairs_are_sorted_by_expert() -> None:
    chosen = torch.tensor([[2, 0], [2, 3], [0, 5]])  # 1 has no pair; 5 is behind the last of four
    experts, order, offsets = experts_module.sort_by_expert(chosen, 4)
    assert experts.tolist() == [0, 0, 2, 2, 3, 5]
    assert order.tolist() == [1, 4, 0, 2, 3, 5]
    assert offsets.tolist() == [2, 2, 4, 5]
    assert offsets.dtype == torch.int32  # what grouped products take


def test_a_compiler_sees_through_router_and_experts() -> None:
    """One graph: nothing in a pass of training waits for the host."""
    module = with_lora(make_experts(width=16)).bfloat16()  # the compiler takes grouped products for bfloat16's alone
    stock = MixtralTopKRouter(MixtralConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=1))
    nn.init.normal_(stock.weight, generator=torch.Generator().manual_seed(0))
    router = Router(stock.bfloat16(), experts=EXPERTS, top_k=1).train()
    router.gate, router.balance, router.max_load = Gate.straight_through, 0.1, 1.0

    def block(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        _, gates, chosen = router(rows)
        return experts_forward(module, rows, chosen, gates), router.penalty

    rows = selection(1)[0].bfloat16()
    torch._dynamo.reset()
    # Not fullgraph=True: that allows what waits.
    assert torch._dynamo.explain(block)(rows).graph_break_count == 0
    found = torch.compile(block, backend="eager")(rows)
    torch.testing.assert_close(found, block(rows), rtol=0.0, atol=0.0)
