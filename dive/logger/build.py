"""Lightning loggers from the configuration."""

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from dive.config import LoggerConfig, WandbConfig
from dive.errors import UserError
from dive.logger.wandb_run import define_axes, run_id


def wandb_logged_in() -> bool:
    """Whether Weights & Biases has a key for this user: in the environment or in netrc; asks no server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def build_wandb(config: WandbConfig, directory: Path, settings: dict[str, Any], store: Path) -> WandbLogger:
    """One run for all stages, offline where nobody is logged in or WANDB_MODE says so.

    The same command after an interruption goes on in the same run.

    Args:
        settings: the composed configuration, recorded with the run.
        store: of the artifacts, where the ids of unfinished runs stand.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE")
    run = wandb.init(
        project=config.project,
        entity=config.entity,
        group=config.group,
        name=config.name,
        tags=config.tags,
        dir=directory,
        id=run_id(settings, store),
        resume="allow",
        reinit="finish_previous",  # the job of a sweep that failed in this process leaves its run open
        mode="offline" if mode is None and not wandb_logged_in() else None,
        config=settings,
        settings=wandb.Settings(quiet=True),  # no curves in block letters between our own tables
    )
    define_axes(run, settings["retrain"]["stages"])
    return WandbLogger(project=config.project, save_dir=directory, experiment=run)


def build_evaluation_loggers(config: LoggerConfig, directory: Path, wandb: WandbLogger | None) -> list[Logger]:
    """Loggers of the evaluations between the stages: W&B's summary, and TensorBoard's scalars in ``tensorboard/eval``."""
    boards = build_stage_loggers(LoggerConfig(tensorboard=config.tensorboard), directory, "eval")
    return boards if wandb is None else [*boards, wandb]


def log_evaluation(logger: Logger, values: Mapping[str, float], *, tokens: int) -> None:
    """Log what one model was measured at after ``tokens`` retraining tokens."""
    if isinstance(logger, WandbLogger):
        logger.experiment.summary.update(dict(values))
    else:
        logger.log_metrics(dict(values), step=tokens)
        logger.save()


def build_stage_loggers(config: LoggerConfig, directory: Path, stage: str) -> list[Logger]:
    """File loggers of one stage, in ``<directory>/csv/<stage>`` and ``<directory>/tensorboard/<stage>``.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """
    loggers: list[Logger] = []
    if config.csv is not None:
        loggers.append(CSVLogger(directory, name="csv", version=stage))
    if config.tensorboard is not None:
        try:
            loggers.append(TensorBoardLogger(directory, name="tensorboard", version=stage))
        except ModuleNotFoundError as error:
            raise UserError(
                "logger=tensorboard needs TensorBoard: pip install 'dive-moe[tensorboard]', or leave it out of logger=[...]"
            ) from error
    return loggers
