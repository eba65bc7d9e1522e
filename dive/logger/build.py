"""Lightning loggers from the configuration."""

import netrc
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from dive.config import LoggerConfig, WandbConfig
from dive.errors import UserError


def wandb_logged_in() -> bool:
    """Whether Weights & Biases has a key for this user: in the environment or in netrc; asks no server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def build_wandb(config: WandbConfig, directory: Path, settings: dict[str, Any]) -> WandbLogger:
    """One run for all stages, offline where nobody is logged in or WANDB_MODE says so.

    Args:
        settings: the composed configuration, recorded with the run.
    """
    mode = os.environ.get("WANDB_MODE")
    offline = mode == "offline" or (mode is None and not wandb_logged_in())
    return WandbLogger(
        project=config.project,
        entity=config.entity,
        group=config.group,
        name=config.name,
        tags=config.tags,
        save_dir=directory,
        offline=offline,
        config=settings,
    )


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
