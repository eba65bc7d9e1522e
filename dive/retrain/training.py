"""What decides the numbers of a stage of retraining, and what only says how they are computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dive.config import (
    PARTS,
    Config,
    Freezing,
    FreezingConfig,
    Gate,
    LoggerConfig,
    LoRAConfig,
    Mode,
    Schedule,
    StageConfig,
    StageText,
    TeacherConfig,
    TrainerConfig,
)

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What decides the numbers of a stage: its part of the key in the store.

    What cannot matter under the other settings is at its default, so that changing it trains nothing anew.
    """

    name: str
    stage: StageConfig
    lora: LoRAConfig
    length: int
    """Tokens of a sequence."""
    noise: float
    """Scale of the learned router noise."""
    precision: str
    """Lightning's."""
    clip: float | None
    """Largest gradient norm."""
    seed: int
    passes: list[int] | None
    """[forward passes of a step on each device, devices], or none where the loss does not depend on them.

    Random draws and the load of experts are taken pass by pass. Every other term is a mean over sequences of equal length."""

    @classmethod
    def of(cls, config: Config, name: str) -> "Training":
        """Of a stage of the configuration."""
        settings, stage = config.retrain, config.retrain.stages[name]
        names = list(settings.stages)
        until = [settings.stages[earlier].train for earlier in names[: names.index(name) + 1]]
        lora = settings.lora if any(map(_adapts, until)) else LoRAConfig()  # adapters stay, in every stage after theirs
        balanced = stage.mode is Mode.sparse and stage.balance > 0
        world = config.trainer.devices * config.trainer.num_nodes
        cut = [config.accumulation(stage), world]
        return cls(
            name=name,
            stage=effective(stage, length=settings.length),
            lora=lora,
            length=settings.length,
            noise=settings.noise,
            precision=config.trainer.precision,
            clip=config.trainer.gradient_clip,
            seed=config.seed,
            passes=cut if balanced or settings.noise or lora.dropout else None,
        )

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return optimiser_steps(self.stage, self.length)

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimiser step, over all devices."""
        return self.stage.batch * self.length

    @property
    def master_weights(self) -> bool:
        """Whether what is trained is kept in float32 beside products in another type."""
        return self.precision.endswith("-mixed")

    @property
    def autocast(self) -> str | None:
        """Element type that mixed precision computes products in; none where that is the weights' own."""
        half = "bfloat16" if self.precision.startswith("bf16") else "float16"
        return half if self.master_weights else None


@dataclass(slots=True, kw_only=True)
class Execution:
    """How a stage is trained: what changes no number but by rounding."""

    trainer: TrainerConfig
    accumulation: int
    """Forward passes of an optimiser step on each device."""
    resume: str | None
    checkpoint_every: int
    log_every: int
    logger: LoggerConfig
    directory: Path
    """Of the run's outputs."""
    trackers: "Sequence[Logger]"
    """Loggers of the whole run."""


def effective(stage: StageConfig, *, length: int) -> StageConfig:
    """The stage, without what cannot matter under its other settings.

    The temperature of the other mode, ``max_load`` without ``balance``, the temperature of a teacher that nobody listens to,
    tokens within the same number of steps. How a step is cut into passes is the hardware's choice, and its text is a corpus,
    which has an identity of its own.

    Args:
        length: tokens of a sequence.
    """
    default = StageConfig(tokens=stage.tokens)
    sparse = stage.mode is Mode.sparse
    balanced = sparse and stage.balance > 0
    return replace(
        stage,
        gate=stage.gate if sparse else default.gate,
        temperature=default.temperature if sparse else stage.temperature,
        balance=stage.balance if balanced else default.balance,
        max_load=stage.max_load if balanced else default.max_load,
        floor=stage.floor if stage.schedule is Schedule.cosine else default.floor,
        teacher=stage.teacher if stage.teacher.logits else TeacherConfig(hidden=stage.teacher.hidden),
        tokens=optimiser_steps(stage, length) * stage.batch * length,
        accumulation=None,
        text=StageText.corpus,
    )


def _adapts(policy: FreezingConfig) -> bool:
    return any(getattr(policy, part) is Freezing.lora for part in PARTS)


def optimiser_steps(stage: StageConfig, length: int) -> int:
    """Optimiser steps of a stage: its tokens, rounded up to whole steps of ``batch`` sequences of ``length`` tokens."""
    return -(-stage.tokens // (stage.batch * length))


def idle_routers(stage: StageConfig, *, experts: int, top_k: int, renormalised: bool) -> str | None:
    """Why no gradient reaches the routers in a stage, or none where one does.

    Args:
        experts: of each layer.
        top_k: experts a token in sparse mode.
        renormalised: whether their gates sum to one.
    """
    if experts == 1:  # its router is zero, where z_loss has no gradient either
        return "there is one expert"
    if not renormalised or stage.z_loss or stage.mode is Mode.dense or top_k > 1 or stage.gate is not Gate.renormalised:
        return None
    if stage.balance and stage.max_load < experts:  # the largest load of all is `experts` times the mean
        return None
    return "one expert a token, renormalised gate"
