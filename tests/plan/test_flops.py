"""Operations against those that torch counts while the real model runs."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from dive.config import PARTS, Freezing, FreezingConfig, LoRAConfig, Mode, StageConfig
from dive.model.architecture import read_architecture
from dive.model.families import empty_moe, moe_config
from dive.moe.plug import plug_routers, routers
from dive.plan import flops
from dive.plan.parameters import Shapes, shapes
from dive.retrain.freezing import apply_policy
from tests.conftest import Build
from tests.model.test_architecture import typed

B, T = 2, 16


def grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Of torch's grouped product, which the counter does not know: (S, in) × (E, in, out), or (in, S) × (S, out)."""
    return int(2 * a[0] * a[1] * b[-1])


def counted(run: Any) -> int:
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped})
    with counter:
        run()
    return int(counter.get_total_flops())


def sizes(dense: PreTrainedModel, *overrides: str) -> Shapes:
    config = typed("pruning.ratio=0.5", "moe.experts=3", "moe.top_k=2", "retrain.lora.rank=4", *overrides)
    return shapes(read_architecture(dense.config.to_dict()), config)


def ids() -> torch.Tensor:
    return torch.randint(320, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["llama", "qwen3-tied"])
def plain(request: pytest.FixtureRequest, build: Build) -> PreTrainedModel:
    """A dense model whose attention is plain matrix products, which the counter sees."""
    return build(request.param, attn_implementation="eager")


def test_dense_forward(plain: PreTrainedModel) -> None:
    with torch.no_grad():
        found = counted(lambda: plain(input_ids=ids(), use_cache=False))
    rope = found - B * T * flops.dense_forward(sizes(plain), T)
    assert 0 <= rope <= 2 * 2 * T * plain.config.head_dim  # positions × frequencies, once a pass


STAGES = {
    "router, dense": StageConfig(mode=Mode.dense, tokens=1, train=FreezingConfig(router=Freezing.full)),
    "paper": StageConfig(
        tokens=1, train=FreezingConfig(router=Freezing.full, norms=Freezing.full, experts=Freezing.lora)
    ),
    "experts alone": StageConfig(tokens=1, train=FreezingConfig(experts=Freezing.full)),
    "attention": StageConfig(tokens=1, train=FreezingConfig(attention=Freezing.full)),
    "all": StageConfig(tokens=1, train=FreezingConfig(**dict.fromkeys(PARTS, Freezing.full))),
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_training_step(plain: PreTrainedModel, stage: StageConfig, noise: float) -> None:
    s = sizes(plain, f"retrain.noise={noise}")
    moe = empty_moe(moe_config(plain.config, width=24, experts=3, top_k=2), torch.float32)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    moe.set_attn_implementation("eager")
    plug_routers(moe, noise=noise)
    apply_policy(moe, stage.train, LoRAConfig(rank=4))
    for router in routers(moe):
        router.mode = stage.mode
    moe.train()
    rows = ids()

    def step() -> None:
        logits = moe(input_ids=rows, use_cache=False).logits
        functional.cross_entropy(logits.flatten(0, 1), rows.flatten()).backward()

    planned = B * T * flops.training(s, stage, T, checkpointing=False)
    assert planned == pytest.approx(counted(step), rel=0.005)


def test_checkpointing_repeats_the_layers_forward() -> None:
    config = typed("model=tinyllama", "retrain=two_stages")
    assert config.model.architecture is not None
    s = shapes(config.model.architecture, config)
    stage = config.retrain.stages["router"]
    without, repeated = (flops.training(s, stage, 256, checkpointing=on) for on in (False, True))
    assert repeated - without == 22 * flops.sparse_layer(s, 256, active=8)


def test_a_layer_by_hand() -> None:
    config = typed("model=llama2-7b")
    assert config.model.architecture is not None
    s = shapes(config.model.architecture, config)
    # D = Q = K = 4096, F = 11008, 256 tokens a sequence
    assert flops.dense_layer(s, 256) == 2 * 4 * 4096**2 + 4 * 256 * 4096 + 2 * 3 * 4096 * 11008 == 408_944_640
