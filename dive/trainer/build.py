"""Lightning trainers from the configuration."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies import Strategy as LightningStrategy
from torch import nn
from torch.distributed.fsdp import MixedPrecision

from dive.config import Strategy, TrainerConfig
from dive.errors import UserError
from dive.trainer.preemption import SaveWhenPreempted
from dive.trainer.rank import process_rank as process_rank

PATIENCE = timedelta(hours=6)
"""The first process evaluates and exports while the others wait."""


def build_strategy(config: TrainerConfig, layer_class: type[nn.Module]) -> LightningStrategy | str:
    """The Lightning strategy; sharding ones shard by ``layer_class``."""
    patience = PATIENCE
    if config.strategy is Strategy.fsdp:
        half = config.precision.startswith("bf16")
        # Frozen and trained parameters of one layer mix, which FSDP1 allows with the original parameters alone.
        return FSDPStrategy(
            auto_wrap_policy={layer_class},
            use_orig_params=True,
            state_dict_type="full",
            timeout=patience,
            # Lightning's own would round the rotary frequencies, which are buffers.
            mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.float32) if half else None,
        )
    if config.strategy is Strategy.fsdp2:
        return ModelParallelStrategy(
            data_parallel_size=config.devices * config.num_nodes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=patience,
        )
    if config.strategy is Strategy.ddp:
        # Every process counts its own expert loads: buffers are not the first process's to overwrite.
        return DDPStrategy(broadcast_buffers=False, timeout=patience)
    return "auto"


def check_devices(config: TrainerConfig) -> None:
    """Refuse devices that this machine lacks.

    Raises:
        UserError: no such accelerator, or too few.
    """
    if config.accelerator not in ("gpu", "cuda"):
        return
    present = torch.cuda.device_count()
    if not present:
        raise UserError(
            f"trainer.accelerator={config.accelerator}: torch finds no GPU on this machine; trainer=cpu runs it all the same, "
            "and `python -m dive.plan` with it says for how long"
        )
    if present < config.devices:
        raise UserError(
            f"trainer.devices ({config.devices}) of accelerator {config.accelerator!r} are asked for, {present} are here; "
            "set trainer.devices, or trainer=cpu"
        )


def build_trainer(
    config: TrainerConfig,
    *,
    layer_class: type[nn.Module],
    steps: int,
    accumulation: int,
    checkpoints: Path,
    checkpoint_every: int,
    loggers: Sequence[Logger],
    callbacks: Sequence[Callback] = (),
) -> lightning.Trainer:
    """A trainer for one stage.

    Args:
        layer_class: decoder layer of the model, the unit of sharding.
        steps: optimiser steps.
        accumulation: forward passes per step.
        checkpoints: directory of the running stage's checkpoints; the newest one is kept.
        checkpoint_every: optimiser steps between them.
        callbacks: beside those that save checkpoints.
    """
    keep_newest = ModelCheckpoint(
        dirpath=checkpoints,
        filename="{step}",
        every_n_train_steps=checkpoint_every,
        save_top_k=1,
        enable_version_counter=False,
    )
    return lightning.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=build_strategy(config, layer_class),
        precision=config.precision,  # type: ignore[arg-type]
        max_epochs=1,
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=config.gradient_clip,
        logger=list(loggers) or False,
        callbacks=[*callbacks, SaveWhenPreempted(checkpoints), keep_newest],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=checkpoints,
    )
