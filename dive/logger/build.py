"""Lightning loggers from the configuration."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from dive.config import LoggerConfig
from dive.errors import UserError
from dive.logger.mlflow_run import build_mlflow
from dive.logger.wandb_run import build_wandb


def build_trackers(config: LoggerConfig, directory: Path, settings: dict[str, Any], store: Path) -> list[Logger]:
    """Loggers that hold a whole run, all stages in one: W&B and MLflow.

    Args:
        directory: of the run's outputs.
        settings: the composed configuration.
        store: of the artifacts.

    Raises:
        UserError: MLflow is asked for, and not installed or not to be reached.
    """
    trackers: list[Logger] = []
    if config.wandb is not None:
        trackers.append(build_wandb(config.wandb, directory, settings, store))
    if config.mlflow is not None:
        try:
            trackers.append(build_mlflow(config.mlflow, settings, store))
        except ModuleNotFoundError as error:
            raise missing("mlflow", "MLflow") from error
    return trackers


def build_stage_loggers(config: LoggerConfig, directory: Path, stage: str) -> list[Logger]:
    """File loggers of one stage, in ``<directory>/csv/<stage>`` and ``<directory>/tensorboard/<stage>``.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """
    files: list[Logger] = [] if config.csv is None else [CSVLogger(directory, name="csv", version=stage)]
    return [*files, *build_boards(config, directory, stage)]


def build_boards(config: LoggerConfig, directory: Path, name: str) -> list[Logger]:
    """TensorBoard's logger in ``<directory>/tensorboard/<name>``, where it is asked for.

    Raises:
        UserError: it is not installed.
    """
    if config.tensorboard is None:
        return []
    try:
        return [TensorBoardLogger(directory, name="tensorboard", version=name)]
    except ModuleNotFoundError as error:
        raise missing("tensorboard", "TensorBoard") from error


def missing(logger: str, package: str) -> UserError:
    """What to install for a logger."""
    return UserError(
        f"logger={logger} needs {package}: pip install 'dive-moe[{logger}]', or leave it out of logger=[...]"
    )
