"""One stage of retraining, from the model before it to an artifact that holds what was trained."""

import logging
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import lightning
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dive import preemption
from dive.config import Config, Freezing, Storage, Strategy
from dive.errors import UserError
from dive.logger.build import build_stage_loggers
from dive.logger.log import log_point
from dive.model.families import decoder_layers, part_of, renormalises
from dive.moe.implementation import use_experts
from dive.moe.mixture import Mixture
from dive.moe.plug import plug_routers
from dive.progress import show
from dive.ranks import others_alive
from dive.retrain.blocks import Blocks, prepare_blocks
from dive.retrain.corpus import Corpus
from dive.retrain.freezing import apply_policy, trained_parameters_table, trained_table
from dive.retrain.module import MoERetraining
from dive.retrain.retrained import CURVE, STAGE, WEIGHTS, Retrained
from dive.retrain.teacher import share_frozen
from dive.retrain.training import Execution, Training, idle_routers
from dive.store import HasStages, Place, write_json
from dive.together import shared_step
from dive.trainer.build import build_trainer
from dive.trainer.progress import StageProgress

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)


class HasLoggers(HasStages, Protocol):
    """What retraining needs of a run."""

    main: bool
    """Whether this process writes; the others train with it."""
    directory: Path
    trackers: "list[Logger]"
    """Loggers of the whole run."""


def retrain(run: HasLoggers, config: Config, *, name: str, model: Mixture | Retrained, corpus: Corpus) -> Retrained:
    """Train one stage, or find it in the store.

    With several processes all of them train, and the first one writes. An interrupted stage goes on from its last
    checkpoint, as ``retrain.resume`` says.

    Args:
        corpus: the stage begins in it where the last one that read it ended.

    Raises:
        UserError: the checkpoint to resume from is missing or of another stage, or the loss is not finite.
        Preempted: SIGTERM or SIGUSR1 came; while the stage trains, a checkpoint is saved first.
    """
    training = Training.of(config, name)
    execution = Execution(
        trainer=config.trainer,
        accumulation=config.accumulation(config.retrain.stages[name]),
        resume=config.retrain.resume,
        checkpoint_every=config.retrain.checkpoint_every,
        log_every=config.retrain.log_every,
        logger=config.logger,
        directory=run.directory,
        trackers=run.trackers,
    )
    artifact = fit_stage(run, execution, model=model, corpus=corpus, training=training)
    preemption.heed()
    found = Retrained(model, artifact, training, corpus.identity)
    if artifact.reused and run.main:
        _replay(execution, found)
    return found


@shared_step("retrained", "weights after this stage of training")
def fit_stage(
    place: Place,
    run: HasLoggers,
    execution: Execution,
    *,
    model: Mixture | Retrained,
    corpus: Corpus,
    training: Training,
) -> None:
    """Train a stage; write every parameter trained up to and with it, its curve, and the sizes of what it trained.

    All processes train; the first one writes.
    """
    start = sum(stage.tokens for stage in model.chain() if stage.corpus == corpus.identity) // corpus.length
    wanted = range(start, start + training.steps * training.stage.batch)
    blocks = prepare_blocks(run, corpus, model=model.dense, wanted=wanted)
    module, state = fit(execution, place.partial, model, blocks, training, first_block=start, speak=place.writes)
    if not place.writes:
        return
    earlier = load_file(model.artifact.path / WEIGHTS) if isinstance(model, Retrained) else {}
    save_file(earlier | state, place.directory / WEIGHTS)
    save_file(module.curve.tensors(), place.directory / CURVE)
    idle = _idle(module.model.config, training) is not None
    moved = {
        name: tensor.numel() for name, tensor in state.items() if not (idle and part_of(module.model, name) == "router")
    }
    write_json(place.directory / STAGE, {"seconds": module.seconds, "sizes": moved})


def fit(
    execution: Execution,
    partial: Path,
    model: Mixture | Retrained,
    blocks: Blocks,
    training: Training,
    *,
    first_block: int,
    speak: bool,
) -> tuple[MoERetraining, dict[str, Tensor]]:
    """Train a stage in this process, with the others of the run if there are any.

    Args:
        partial: directory of the running stage's checkpoints.
        first_block: where in the corpus the stage begins.
        speak: print what is trained.

    Returns:
        The module, and {parameter: what it was trained to}, whole, on the host.
    """
    strategy, dense = execution.trainer.strategy, model.dense
    student = model.take(master_weights=training.master_weights)
    plug_routers(student, noise=training.noise)
    lightning.seed_everything(training.seed, verbose=False)
    apply_policy(student, training.stage.train, training.lora, master_weights=training.master_weights)
    choice = use_experts(student, execution.trainer.experts, autocast=training.autocast)
    if speak:
        log.info("%s: %s", training.name, choice)
        idle = _idle(student.config, training)
        table = trained_parameters_table(training.name, trained_table(student, idle_routers=idle is not None))
        show(table)
        if idle is not None and training.stage.train.router is Freezing.full:
            show(f"router: no gradient: {idle}")
    teacher = dense.load() if training.stage.teacher.wanted else None
    indexed = model.mixture.storage is Storage.indexed  # the dense model is in memory, taught by or not
    if indexed or (teacher is not None and strategy in (Strategy.single, Strategy.ddp)):
        share_frozen(dense.load(), student)
    if execution.trainer.gradient_checkpointing:
        # transformers renamed it in 5.2x; both take torch.utils.checkpoint's arguments
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    module = MoERetraining(
        student,
        training,
        blocks,
        key=partial.name,
        first_block=first_block,
        accumulation=execution.accumulation,
        log_every=execution.log_every,
        shard=strategy is Strategy.fsdp2,
        teacher=teacher,
    )
    _run(module, execution, partial)
    return module, _gather(module)


def _idle(config: "PretrainedConfig", training: Training) -> str | None:
    experts, top_k = config.num_experts, config.num_experts_per_tok
    return idle_routers(training.stage, experts=experts, top_k=top_k, renormalised=renormalises(config))


def _run(module: MoERetraining, execution: Execution, partial: Path) -> None:
    """The module's training by Lightning."""
    name = module.name
    checkpoint = find_checkpoint(execution.resume, partial, name)
    if checkpoint is not None:
        log.info("%s: going on from %s", name, checkpoint)
    trainer = build_trainer(
        execution.trainer,
        layer_class=type(decoder_layers(module.model)[0]),
        steps=module.steps,
        accumulation=execution.accumulation,
        checkpoints=partial,
        checkpoint_every=execution.checkpoint_every,
        loggers=[*build_stage_loggers(execution.logger, execution.directory, name), *execution.trackers],
        callbacks=[StageProgress(name, steps=module.steps, tokens=module.recipe.step_tokens, loss=module.recent_loss)],
    )
    try:
        with others_alive(f"stage {name}: "):
            trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as end:
        raise KeyboardInterrupt from end  # how Lightning ends on Ctrl-C


def _replay(execution: Execution, stage: Retrained) -> None:
    """Give a run that found the stage in the store the values it would have logged."""
    files = build_stage_loggers(execution.logger, execution.directory, stage.training.name)
    for values in stage.curve(execution.log_every):
        for logger in (*files, *execution.trackers):
            log_point(logger, stage.training.name, values)
    for logger in files:
        logger.finalize("success")


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
    except Exception as error:  # the unpickler trips over other files in many ways
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
