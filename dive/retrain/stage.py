"""One stage of retraining, from the model before it to an artifact that holds what was trained."""

import json
import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dive import preemption
from dive.artifacts import Artifact, Store, write_json
from dive.config import Config, Storage, Strategy
from dive.errors import UserError
from dive.logger.build import build_stage_loggers
from dive.model.families import decoder_layers
from dive.moe.plug import plug_routers
from dive.report.text import show, trained_parameters_table
from dive.retrain.corpus import Blocks
from dive.retrain.freezing import apply_policy, plug_adapters, trained_table
from dive.retrain.module import MoERetraining, log_values, optimiser_steps
from dive.retrain.teacher import share_frozen
from dive.trainer.build import build_trainer
from dive.trainer.processes import connect, connected, from_first

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(slots=True)
class RetrainedStage:
    """A finished stage."""

    name: str
    artifact: Artifact
    """``trained.safetensors``: every parameter trained up to and with this stage; ``curve.json``."""
    tokens: int
    seconds: float
    """Training time, interrupted runs included."""
    trained: int
    """Parameters this stage trained."""
    sizes: dict[str, int]
    """{parameter trained by this stage: its size}"""
    curve: list[dict[str, float]]
    """Logged values of the stage."""


def retrain_stage(
    store: Store,
    name: str,
    config: Config,
    reconstructed: Callable[[], "PreTrainedModel"],
    dense: Callable[[], "PreTrainedModel"],
    before: Sequence[RetrainedStage],
    blocks: Blocks,
    *,
    depends: Mapping[str, Any],
    directory: Path,
    wandb: "WandbLogger | None",
    main_process: bool,
) -> RetrainedStage:
    """Train one stage, or find it in the store.

    With several processes all of them train, and the first one writes. An interrupted stage goes on from its last
    checkpoint, as ``retrain.resume`` says.

    Args:
        reconstructed: makes the model as it was before any retraining.
        dense: gives the dense model, where the stage learns from it.
        before: the stages before this one, in order.
        blocks: the corpus; a stage begins where the one before it ended.
        depends: what identifies the reconstructed model and the corpus.

    Raises:
        UserError: the checkpoint to resume from is missing or of another stage, or the loss is not finite.
        Preempted: SIGTERM or SIGUSR1 came; while the stage trains, a checkpoint is saved first.
    """
    retrain, stage = config.retrain, config.retrain.stages[name]
    steps = optimiser_steps(stage, retrain.length)
    inputs = {
        **depends,
        "before": before[-1].artifact.key if before else None,
        "name": name,
        "stage": stage,
        "lora": retrain.lora,
        "length": retrain.length,
        "noise": config.moe.noise,
        "precision": config.trainer.precision,
        "gradient_clip": config.trainer.gradient_clip,
        "log_every": retrain.log_every,
        "seed": config.seed,
    }
    if config.moe.storage is not Storage.materialised:
        inputs["storage"] = config.moe.storage  # the same to rounding
    if retrain.lora.dropout or config.moe.noise:
        # What is drawn at random depends on how a step is cut into passes.
        world = config.trainer.devices * config.trainer.num_nodes
        inputs["passes"] = (stage.accumulation or config.trainer.accumulation) * world

    def train() -> tuple[MoERetraining, dict[str, Tensor]]:
        master_weights = config.trainer.precision.endswith("-mixed")
        model = retrained_model(reconstructed, config, before, master_weights=master_weights)
        lightning.seed_everything(config.seed, verbose=False)
        apply_policy(model, stage.train, retrain.lora, master_weights=master_weights)
        if main_process:
            show(trained_parameters_table(name, trained_table(model)))
        teacher = dense() if stage.teacher.wanted else None
        shared = config.moe.storage is Storage.shared  # the dense model is in memory, taught by or not
        if shared or (teacher is not None and config.trainer.strategy in (Strategy.single, Strategy.ddp)):
            share_frozen(dense(), model)
        module = _fit(store, model, teacher, name, config, blocks, inputs, before, directory, wandb)
        return module, _gather(module)

    def write(folder: Path, module: MoERetraining, state: dict[str, Tensor]) -> None:
        earlier = load_file(before[-1].artifact.path / "trained.safetensors") if before else {}
        save_file(earlier | state, folder / "trained.safetensors")
        write_json(
            folder / "curve.json",
            {"seconds": module.seconds, "curve": module.curve, "sizes": {k: v.numel() for k, v in state.items()}},
        )

    connect(config.trainer)
    artifact = _lead(store, inputs, train, write) if main_process else _follow(store, inputs, train)
    preemption.heed()
    if main_process:
        store.forget_partial("retrained", inputs)
    logged = json.loads((artifact.path / "curve.json").read_text())
    if artifact.reused and main_process:
        _replay(logged["curve"], name, config, directory, wandb)
    return RetrainedStage(
        name=name,
        artifact=artifact,
        tokens=steps * stage.batch * retrain.length,
        seconds=logged["seconds"],
        trained=sum(logged["sizes"].values()),
        sizes=logged["sizes"],
        curve=logged["curve"],
    )


FOUND, TRAIN, FAILED = range(3)
"""What the first process tells the others: the stage is in the store, train it with me, I could not write it."""
Train = Callable[[], tuple[MoERetraining, dict[str, Tensor]]]


def _lead(
    store: Store,
    inputs: Mapping[str, Any],
    train: Train,
    write: Callable[[Path, MoERetraining, dict[str, Tensor]], None],
) -> Artifact:
    """The artifact, in the first process: it alone looks into the store and writes, and tells the others."""
    trained = False

    def compute(folder: Path) -> None:
        nonlocal trained
        from_first(TRAIN)
        module, state = train()
        trained = True
        write(folder, module, state)

    try:
        artifact = store.get("retrained", inputs, compute)
    except Exception:
        if trained:  # the others have taken part and wait
            from_first(FAILED)
        raise
    from_first(FOUND)
    return artifact


def _follow(store: Store, inputs: Mapping[str, Any], train: Train) -> Artifact:
    """The artifact, in another process.

    Whether to train is the first one's decision: another run may be computing the stage, and the first process waits for it.
    A process that Lightning has just started is not connected yet: the first one trains what is not in the store.
    """
    decision = from_first(FOUND) if connected() else None
    if decision is None and store.find("retrained", inputs) is None:
        decision = TRAIN
    if decision == TRAIN:
        train()
        decision = from_first(FOUND)
    found = None if decision == FAILED else store.find("retrained", inputs)
    if found is None:
        raise UserError("the first process of this run could not write the stage; what it said tells why")
    return found


def _replay(
    curve: list[dict[str, float]], name: str, config: Config, directory: Path, wandb: "WandbLogger | None"
) -> None:
    """Give a run that found the stage in the store the values it would have logged."""
    loggers = build_stage_loggers(config.logger, directory, name)
    for values in curve:
        for logger in loggers if wandb is None else [*loggers, wandb]:
            log_values(logger, name, values)
    for logger in loggers:
        logger.finalize("success")


def retrained_model(
    reconstructed: Callable[[], "PreTrainedModel"],
    config: Config,
    stages: Sequence[RetrainedStage],
    *,
    master_weights: bool = False,
) -> "PreTrainedModel":
    """The model after these stages: routers plugged, adapters in place but not merged, in evaluation mode.

    Args:
        master_weights: keep what was trained in the element type it was trained in, to go on training.
    """
    model = reconstructed()
    plug_routers(model, noise=config.moe.noise)
    for stage in stages:
        plug_adapters(model, config.retrain.stages[stage.name].train, config.retrain.lora)
    if stages:
        state = load_file(stages[-1].artifact.path / "trained.safetensors")
        if master_weights:
            for name, parameter in model.named_parameters():
                if name in state:
                    parameter.data = parameter.data.to(state[name].dtype)
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
        if unexpected:
            raise UserError(
                f"store: the artifact of stage {stages[-1].name} has parameters the model lacks: {unexpected[:3]}"
            )
    return model.eval()


def _fit(
    store: Store,
    model: "PreTrainedModel",
    teacher: "PreTrainedModel | None",
    name: str,
    config: Config,
    blocks: Blocks,
    inputs: Mapping[str, Any],
    before: Sequence[RetrainedStage],
    directory: Path,
    wandb: "WandbLogger | None",
) -> MoERetraining:
    retrain, stage = config.retrain, config.retrain.stages[name]
    partial = store.partial("retrained", inputs)
    checkpoint = find_checkpoint(retrain.resume, partial, name)
    accumulation = stage.accumulation or config.trainer.accumulation
    if config.trainer.gradient_checkpointing:
        # transformers renamed it in 5.2x; both take torch.utils.checkpoint's arguments
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    module = MoERetraining(
        model,
        stage,
        retrain,
        blocks,
        name=name,
        key=partial.name,
        first_block=sum(s.tokens // retrain.length for s in before),
        accumulation=accumulation,
        seed=config.seed,
        shard=config.trainer.strategy is Strategy.fsdp2,
        teacher=teacher,
    )
    loggers = build_stage_loggers(config.logger, directory, name)
    trainer = build_trainer(
        config.trainer,
        layer_class=type(decoder_layers(model)[0]),
        steps=module.steps,
        accumulation=accumulation,
        checkpoints=partial,
        checkpoint_every=retrain.checkpoint_every,
        loggers=loggers if wandb is None else [*loggers, wandb],
    )
    if checkpoint is not None:
        log.info("%s: going on from %s", name, checkpoint)
    try:
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as end:
        raise KeyboardInterrupt from end  # how Lightning ends on Ctrl-C
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "by peer" in str(error):
            raise UserError(f"stage {name}: another process of this run has ended; what it said tells why") from error
        raise
    return module


def find_checkpoint(resume: str | None, partial: Path, name: str) -> Path | None:
    """The checkpoint a stage goes on from: the newest in ``partial`` for ``last``, or the path that ``resume`` is.

    Raises:
        UserError: there is no checkpoint at that path, or it is of this stage under another configuration.
    """
    if resume is None:
        return None
    if resume == "last":
        found = sorted(partial.glob("step=*.ckpt"), key=lambda file: int(file.stem.rpartition("=")[2]), reverse=True)
        for file in found:
            if zipfile.is_zipfile(file):  # its directory stands at the end: a file cut short has none
                return file
            log.warning("%s: %s is cut short and left aside", name, file)
        return None
    path = Path(resume).expanduser()
    if not path.is_file():
        raise UserError(
            f"retrain.resume={resume}: no such checkpoint; `last` finds the newest one of this stage by itself"
        )
    try:
        belongs = torch.load(path, map_location="cpu", weights_only=True)["dive"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"retrain.resume={resume} is not a checkpoint of this project") from error
    if belongs["key"] == partial.name:
        return path
    if belongs["stage"] != name:
        return find_checkpoint("last", partial, name)  # another stage's: this one goes on by itself
    raise UserError(
        f"retrain.resume={resume}: this checkpoint of stage {name} was made with another configuration or other data"
    )


def _gather(module: MoERetraining) -> dict[str, Tensor]:
    """What the stage trained, whole, on the host; collective where parameters are sharded."""
    state = module.trainer.strategy.lightning_module_state_dict()
    return {
        name.removeprefix("model."): tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if name in module.trained_names
    }
