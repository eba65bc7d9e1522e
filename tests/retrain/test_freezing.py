"""The freezing policy: exactly what it names is trained."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from dive.api import reconstruct
from dive.config import PARTS, Freezing, FreezingConfig, LoRAConfig
from dive.errors import UserError
from dive.model.families import part_of
from dive.moe.plug import plug_routers
from dive.pruning.calibrate import collect_statistics
from dive.retrain.freezing import apply_policy, check_policy, is_adapter, trained_table

LORA = LoRAConfig(rank=2)


def trained_names(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.fixture
def make_moe(build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor]) -> Callable[..., Any]:
    def make(variant: str = "llama", *, noise: float = 0.0, **settings: Any) -> PreTrainedModel:
        model = build(variant)
        statistics = collect_statistics(model, {"a": tokens(2, 16), "b": tokens(2, 16, seed=1)})
        moe = reconstruct(model, list(statistics.values()), ratio=0.5, router_init="random", top_k=2, **settings)
        plug_routers(moe, noise=noise)
        return moe

    return make


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_one_part_in_full(make_moe: Callable[..., Any], variant: str, part: str) -> None:
    moe = make_moe(variant, noise=0.1)
    apply_policy(moe, FreezingConfig(**{part: Freezing.full}), LORA)
    trained = {name for name, parameter in moe.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in moe.named_parameters() if part_of(moe, name) == part}
    assert trained
    assert set(trained_names(moe)) == trained


@pytest.mark.parametrize("part", ["experts", "attention", "embeddings", "head"])
def test_one_part_by_adapters(make_moe: Callable[..., Any], part: str) -> None:
    moe = make_moe()
    before = dict(moe.named_parameters())
    apply_policy(moe, FreezingConfig(**{part: Freezing.lora}), LORA)
    added = {name for name, _ in moe.named_parameters()} - set(before)
    trained = {name for name, parameter in moe.named_parameters() if parameter.requires_grad}
    assert trained == added
    assert trained
    assert all(is_adapter(name) and part_of(moe, name) == part for name in trained)


def test_adapters_of_an_earlier_stage_are_frozen(make_moe: Callable[..., Any]) -> None:
    moe = make_moe()
    apply_policy(moe, FreezingConfig(experts=Freezing.lora), LORA)
    apply_policy(moe, FreezingConfig(router=Freezing.full), LORA)
    assert {part_of(moe, name) for name, p in moe.named_parameters() if p.requires_grad} == {"router"}
    apply_policy(moe, FreezingConfig(experts=Freezing.full), LORA)
    assert not any(is_adapter(name) for name in trained_names(moe))


def test_the_papers_second_stage_by_hand(make_moe: Callable[..., Any]) -> None:
    moe = make_moe()
    policy = FreezingConfig(router=Freezing.full, norms=Freezing.full, experts=Freezing.lora)
    apply_policy(moe, policy, LORA)
    table = {part: (total, trained) for part, total, trained in trained_table(moe)}
    # 2 layers of 2 experts of width 24: adapters of rank 2 have 2 · (32 + 24) numbers, three an expert.
    adapters = 2 * 2 * 3 * 2 * (32 + 24)
    assert table["experts"] == (2 * 2 * 3 * 32 * 24 + adapters, adapters)
    assert table["router"] == (2 * 2 * 32, 2 * 2 * 32)
    assert table["norms"] == (5 * 32, 5 * 32)
    assert table["attention"] == (2 * (32 * 32 * 2 + 32 * 16 * 2), 0)
    assert table["embeddings"] == table["head"] == (320 * 32, 0)
    assert sum(total for total, _ in table.values()) == sum(p.numel() for p in moe.parameters())


def test_flaps_bias_is_never_trained(make_moe: Callable[..., Any]) -> None:
    moe = make_moe(compensation="bias")
    apply_policy(moe, FreezingConfig(experts=Freezing.full), LORA)
    names = set(trained_names(moe))
    assert any(name.endswith("down_proj") for name in names)
    assert not any(name.endswith("down_bias") for name in names)


def test_gradients_reach_what_is_trained_and_nothing_else(
    make_moe: Callable[..., Any], tokens: Callable[..., Tensor]
) -> None:
    moe = make_moe().train()
    policy = FreezingConfig(router=Freezing.full, norms=Freezing.full, experts=Freezing.lora)
    apply_policy(moe, policy, LORA)
    ids = tokens(4, 16)
    moe(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in moe.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif name.endswith(".a"):
            assert not parameter.grad.any(), name  # B is zero at first
        else:
            assert parameter.grad.any(), name
            assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize(
    ("policy", "accepted"),
    [
        ({}, True),
        ({"router": Freezing.full}, True),
        ({"embeddings": Freezing.full, "head": Freezing.full}, True),
        ({"embeddings": Freezing.full}, False),
        ({"head": Freezing.full}, False),
        ({"embeddings": Freezing.lora, "head": Freezing.lora}, False),
    ],
)
def test_tied_embeddings(policy: dict[str, Freezing], accepted: bool) -> None:
    check_policy(FreezingConfig(**policy), LlamaConfig(tie_word_embeddings=False), where="stage")
    tied = LlamaConfig(tie_word_embeddings=True)
    if accepted:
        check_policy(FreezingConfig(**policy), tied, where="stage")
    else:
        with pytest.raises(UserError, match=r"stage\.train\.head=.*set both to full, or both to frozen"):
            check_policy(FreezingConfig(**policy), tied, where="stage")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.experts.lora_gate.a", True),
        ("lm_head.lora.b", True),
        ("model.layers.0.mlp.experts.down_proj", False),
        ("model.layers.0.mlp.gate.weight", False),
    ],
)
def test_is_adapter(name: str, expected: bool) -> None:
    assert is_adapter(name) is expected
