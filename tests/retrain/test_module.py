"""A stage trained for real on a tiny model: what a step's cut, checkpointing and the gate do to it."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import PreTrainedModel

from dive.api import reconstruct
from dive.config import (
    Freezing,
    FreezingConfig,
    Gate,
    LoRAConfig,
    Mode,
    Schedule,
    StageConfig,
    TeacherConfig,
    TrainerConfig,
)
from dive.model.families import decoder_layers
from dive.moe.plug import plug_routers, routers
from dive.pruning.calibrate import collect_statistics
from dive.retrain.freezing import apply_policy
from dive.retrain.module import MoERetraining
from dive.retrain.training import Training, idle_routers
from dive.trainer.build import build_trainer

LENGTH, BATCH = 16, 8
TRAIN = FreezingConfig(router=Freezing.full, norms=Freezing.full, experts=Freezing.full)
DEFAULT = TeacherConfig(logits=0.5, hidden=4.0)
"""Of ``retrain=default``."""


def stage_of(*, steps: int = 3, **settings: Any) -> StageConfig:
    return StageConfig(
        **{"train": TRAIN, "learning_rate": 1e-3, "batch": BATCH, "tokens": steps * BATCH * LENGTH} | settings
    )


@pytest.fixture
def fit(build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor], tmp_path: Path) -> Callable[..., Any]:
    """``fit(stage, top_k=1, accumulation=1)``: a tiny Mixture-of-Experts after that stage, and the module of its training."""

    def blocks(number: int) -> Tensor:  # sequences as different as hidden states come
        return torch.full((LENGTH,), number % 320) if number % 2 else tokens(1, LENGTH, seed=number)[0]

    def train(
        stage: StageConfig,
        *,
        experts: int = 3,
        top_k: int = 1,
        accumulation: int = 1,
        checkpointing: bool = False,
        callbacks: tuple[Callback, ...] = (),
        overrides: tuple[str, ...] = (),
    ) -> MoERetraining:
        dense = build("llama")
        statistics = collect_statistics(dense, {str(n): tokens(2, 16, seed=n) for n in range(experts)})
        moe = reconstruct(dense, list(statistics.values()), overrides, ratio=0.5, router_init="random", top_k=top_k)
        plug_routers(moe)
        apply_policy(moe, stage.train, LoRAConfig())
        if checkpointing:
            moe.gradient_checkpointing_enable({"use_reentrant": False})
        training = Training(
            name="retrain",
            stage=stage,
            lora=LoRAConfig(),
            length=LENGTH,
            noise=0.0,
            precision="32-true",
            clip=1.0,
            seed=0,
            passes=None,
        )
        module = MoERetraining(
            moe,
            training,
            blocks,
            key="",
            first_block=0,
            accumulation=accumulation,
            log_every=2,
            shard=False,
            teacher=dense if stage.teacher.wanted else None,
        )
        trainer = build_trainer(
            TrainerConfig(accelerator="cpu", accumulation=accumulation),
            layer_class=type(decoder_layers(moe)[0]),
            steps=module.steps,
            accumulation=accumulation,
            checkpoints=tmp_path,
            checkpoint_every=100,
            loggers=[],
        )
        trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
        trainer.fit(module)
        return module

    return train


def trained(module: MoERetraining) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("accumulation", [2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_weights_do_not_depend_on_how_a_step_is_cut(
    fit: Callable[..., MoERetraining], accumulation: int, top_k: int
) -> None:
    stage = stage_of(teacher=DEFAULT, z_loss=0.01)
    whole = trained(fit(stage, top_k=top_k))
    cut = trained(fit(stage, top_k=top_k, accumulation=accumulation))
    moved = max(float((cut[name] - whole[name]).abs().max()) for name in whole)
    assert moved < 2e-5  # of three steps of 1e-3 each


def test_the_balance_penalty_does(fit: Callable[..., MoERetraining]) -> None:
    stage = stage_of(balance=1.0, max_load=1.0)
    whole, cut = trained(fit(stage)), trained(fit(stage, accumulation=8))
    assert max(float((cut[name] - whole[name]).abs().max()) for name in whole) > 1e-4  # why the key holds the passes


class Watch(Callback):
    """What is there after every backward pass."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self.weights: list[Tensor] = []
        """Of the routers, before the first step."""
        self.penalties: list[Tensor] = []
        self.counted: list[float] = []
        self.alive: list[int] = []
        self._logits: list[weakref.ref[Tensor]] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for router in routers(pl_module.model):  # type: ignore[arg-type]
            self.weights.append(router.weight.detach().clone())
            router.register_forward_hook(lambda _, __, output: self._logits.append(weakref.ref(output[0])))

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        gc.collect()
        self.alive.append(sum(reference() is not None for reference in self._logits))
        found = routers(pl_module.model)  # type: ignore[arg-type]
        self.penalties += [router.penalty for router in found if router.penalty is not None]
        self.counted += [float(router.tokens) for router in found]
        self.gradients.append([router.weight.grad.clone() for router in found if router.weight.grad is not None])


def test_checkpointed_layers_leave_nothing_behind(fit: Callable[..., MoERetraining]) -> None:
    stage = stage_of(balance=0.5, max_load=1.0, z_loss=0.1)
    watch = Watch()
    checkpointed = fit(stage, top_k=2, checkpointing=True, callbacks=(watch,))
    assert watch.penalties == []
    assert watch.alive == [0] * 3  # logits of any router, of the forward pass or of its repetition
    assert watch.counted == [BATCH * LENGTH] * 6  # each token once in each of two layers
    plain = fit(stage, top_k=2)
    for name, weight in trained(plain).items():
        torch.testing.assert_close(trained(checkpointed)[name], weight, rtol=0, atol=1e-6, msg=name)
    for one, other in zip(checkpointed.curve.load, plain.curve.load, strict=True):
        torch.testing.assert_close(one, other)


GATES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "default": ({}, {}),
    "default-teacher": ({"teacher": DEFAULT}, {}),
    "two": ({}, {"top_k": 2}),
    "dense": ({"mode": Mode.dense}, {}),
    "straight-through": ({"gate": Gate.straight_through}, {}),
    "switch": ({"gate": Gate.switch}, {}),
    "z-loss": ({"z_loss": 0.1}, {}),
    "balance": ({"balance": 0.1, "max_load": 1.0}, {}),
    "balance-out-of-reach": ({"balance": 0.1, "max_load": 3.0}, {}),
    "balance-in-dense-mode": ({"balance": 0.1, "mode": Mode.dense}, {}),
    "one": ({"gate": Gate.straight_through}, {"experts": 1}),
    "one-dense": ({"mode": Mode.dense, "balance": 1.0}, {"experts": 1}),
    "probabilities": ({}, {"overrides": ("moe.gates=probabilities", "model.twin=qwen2_moe")}),
    "one-z-loss": ({"z_loss": 0.1}, {"experts": 1}),
}


@pytest.mark.parametrize("case", GATES)
def test_routers_are_called_idle_where_their_gradient_is_exactly_zero(
    fit: Callable[..., MoERetraining], case: str
) -> None:
    settings, shape = GATES[case]
    stage = stage_of(steps=2, **settings)
    watch = Watch()
    module = fit(stage, callbacks=(watch,), **shape)
    renormalised = case != "probabilities"
    idle = idle_routers(stage, experts=shape.get("experts", 3), top_k=shape.get("top_k", 1), renormalised=renormalised)
    assert [len(pass_) for pass_ in watch.gradients] == [2, 2]  # none is missing: DDP waits for each
    largest = max(float(gradient.abs().max()) for pass_ in watch.gradients for gradient in pass_)
    assert (largest == 0.0) is (idle is not None)
    after = [router.weight for router in routers(module.model)]
    assert all(torch.equal(*pair) for pair in zip(watch.weights, after, strict=True)) is (idle is not None)
    if idle is None:
        assert largest > 1e-5


def test_the_curve_has_every_step_with_its_own_learning_rate(fit: Callable[..., MoERetraining]) -> None:
    stage = stage_of(steps=5, warmup=0.6, schedule=Schedule.constant)
    module = fit(stage, accumulation=2)
    # Three steps of rising: a third of the peak, two thirds, the peak.
    assert module.curve.learning_rate == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3])
    assert [point["step"] for point in module.points()] == [2, 4, 5]
    assert [point["learning_rate"] for point in module.points()] == pytest.approx([2e-3 / 3, 1e-3, 1e-3])
    for load in module.curve.load:
        torch.testing.assert_close(load.sum(dim=1), torch.ones(2))
