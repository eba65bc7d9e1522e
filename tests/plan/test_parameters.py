"""Parameter counts against the paper's, the stock classes', and what a stage really trains."""

import pytest
import torch
from transformers import PreTrainedModel

from dive.config import ArchitectureConfig, Config, Freezing, FreezingConfig, LoRAConfig, Mode, MoEConfig, StageConfig
from dive.model.architecture import read_architecture
from dive.model.families import count_parameters, empty_moe, moe_config
from dive.moe.plug import plug_routers
from dive.plan.parameters import Shapes, reached, shapes, trained
from dive.retrain.freezing import apply_policy, trained_table
from tests.model.test_architecture import typed

SPARSE = FreezingConfig(router=Freezing.full, norms=Freezing.full, experts=Freezing.lora)
"""The paper's second stage."""


def of_preset(*overrides: str) -> Shapes:
    config = typed(*overrides)
    assert config.model.architecture is not None
    return shapes(config.model.architecture, config)


def test_tinyllama_1_of_8_as_in_the_paper() -> None:
    s = of_preset("model=tinyllama", "experiment=paper_1_8")
    # D 2048, F 5632 → W 2816, 22 layers, 32 query and 4 key heads of 64, V 32000, 8 experts
    embeddings = 2 * 32000 * 2048
    attention = 22 * (2 * 2048 * 2048 + 2 * 2048 * 256)
    norms = (2 * 22 + 1) * 2048
    one_expert = 22 * 3 * 2048 * 2816
    routers = 22 * 8 * 2048
    assert s.dense == embeddings + attention + norms + 2 * one_expert == 1_100_048_384
    assert s.total == embeddings + attention + norms + 8 * one_expert + routers == 3_384_207_360
    assert s.active == embeddings + attention + norms + one_expert + routers == 719_775_744  # 0.720 B
    # The paper's 3.385 B count what its training has beside: noise weights, as many as the routers have, and FLAP's biases.
    assert s.noise_weights == s.biases == routers == 360_448
    assert s.total + s.noise_weights + s.biases == 3_384_928_256
    lora = 22 * 8 * 3 * 8 * (2048 + 2816)
    assert sum(trained(s, [SPARSE]).values()) == lora + 2 * routers + norms == 21_358_592  # 21.4 M
    assert round(100 * 21_358_592 / 3_384_928_256, 2) == 0.63


def test_tinyllama_2_of_8_as_in_the_paper() -> None:
    s = of_preset("model=tinyllama", "experiment=paper_2_8")
    assert s.width == 1408
    assert s.total == 1_861_675_008  # 1.862 B, and with noise weights and biases still so
    assert s.total + s.noise_weights + s.biases == 1_862_395_904
    assert s.active == 719_775_744
    assert sum(trained(s, [SPARSE]).values()) == 15_411_200  # 15.4 M


def test_without_noise_routers_are_all_that_the_first_stage_trains() -> None:
    s = of_preset("model=llama2-7b", "moe.experts=8")
    assert sum(trained(s, [FreezingConfig(router=Freezing.full)]).values()) == 32 * 8 * 4096
    assert s.noise_weights == s.biases == 0


def tiny(dense: PreTrainedModel, *overrides: str) -> tuple[Shapes, Config, ArchitectureConfig]:
    config = typed("pruning.ratio=0.5", "moe.experts=3", *overrides)
    architecture = read_architecture(dense.config.to_dict())
    return shapes(architecture, config), config, architecture


def test_counts_are_those_of_the_stock_classes(dense: PreTrainedModel) -> None:
    s, _, _ = tiny(dense, "moe.top_k=2")
    assert s.dense == sum(p.numel() for p in dense.parameters())
    assert (s.total, s.active) == count_parameters(moe_config(dense.config, width=24, experts=3, top_k=2))


def test_another_moe_than_the_configured_one(dense: PreTrainedModel) -> None:
    _, config, architecture = tiny(dense)
    single = shapes(architecture, config, MoEConfig(experts=1, top_k=1))
    assert (single.total, single.active) == count_parameters(moe_config(dense.config, width=24, experts=1, top_k=1))


POLICIES = {
    "router": FreezingConfig(router=Freezing.full),
    "paper": SPARSE,
    "attention": FreezingConfig(attention=Freezing.lora, norms=Freezing.full),
    "all": FreezingConfig(
        **dict.fromkeys(("router", "experts", "norms", "attention", "embeddings", "head"), Freezing.full)
    ),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_trained_parameters_are_those_that_a_stage_gives_gradients(
    dense: PreTrainedModel, policy: FreezingConfig, noise: float
) -> None:
    s, _, _ = tiny(dense, f"retrain.noise={noise}", "retrain.lora.rank=4")
    moe = empty_moe(moe_config(dense.config, width=24, experts=3, top_k=1), torch.float32)
    plug_routers(moe, noise=noise)
    apply_policy(moe, policy, LoRAConfig(rank=4))
    counted = {part: count for part, _, count in trained_table(moe) if count}
    found: dict[str, int] = {}
    for name, count in trained(s, [policy]).items():
        part = name.removesuffix(".lora")
        found[part] = found.get(part, 0) + count
    assert {part: count for part, count in found.items() if count} == counted


def test_several_stages_count_a_parameter_once() -> None:
    s = of_preset("model=tinyllama")
    assert trained(s, [POLICIES["router"], SPARSE]) == trained(s, [SPARSE])


def test_routers_that_no_gradient_reaches_do_not_count() -> None:
    s = of_preset("model=tinyllama", "moe.top_k=1")
    sparse = StageConfig(train=SPARSE, tokens=1)
    dense = StageConfig(train=FreezingConfig(router=Freezing.full), mode=Mode.dense, tokens=1)
    every = sum(trained(s, [SPARSE]).values())
    assert reached(s, [sparse]) == every - s.layers * s.router
    assert reached(s, [dense]) == s.layers * s.router
    assert reached(s, [dense, sparse]) == reached(s, [sparse, dense]) == every
    assert reached(of_preset("model=tinyllama", "moe.top_k=2"), [sparse]) == every
