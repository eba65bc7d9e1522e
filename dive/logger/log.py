"""Tell a logger what a run finds, whichever logger it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import Logger
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from dive.logger import board, keys, mlflow_run, wandb_run
from dive.logger.mlflow_run import MLflowRun
from dive.results import Results, StageResult


def log_point(logger: Logger, stage: str, values: dict[str, float]) -> None:
    """Log one point of a stage's curve; a tracker that goes on in an interrupted run has the points before it."""
    if values[keys.STEP] > _holds(logger).get(keys.of(stage, keys.STEP), -1):
        _log(logger, keys.curve(stage, values), int(values[keys.STEP]))


def log_evaluation(logger: Logger, stage: StageResult, *, tokens: int) -> None:
    """Log what one model was measured at after ``tokens`` retraining tokens of all stages."""
    had = _holds(logger)
    values = {key: value for key, value in keys.evaluation(stage).items() if had.get(key) is None}
    if values:
        _log(logger, values, tokens)
        logger.save()


def _log(logger: Logger, values: dict[str, float], step: int) -> None:
    """W&B counts steps of its own, and would get ours as trainer/global_step."""
    logger.log_metrics(values, step=None if isinstance(logger, WandbLogger) else step)


def _holds(logger: Logger) -> Mapping[str, float]:
    """The latest value of each key of an interrupted run that this logger goes on in."""
    if isinstance(logger, WandbLogger):
        found: Mapping[str, float] = logger.experiment.summary
        return found
    return logger.had if isinstance(logger, MLflowRun) else {}


def finish(
    logger: Logger, results: Results, directory: Path, settings: Mapping[str, Any], store: Path
) -> tuple[str, str] | None:
    """Log what a finished run found, as far as the logger can hold it, and end the logger's run.

    Args:
        directory: of the run's outputs.
        settings: the composed configuration.
        store: of the artifacts.

    Returns:
        Name of the tracker, and where it has the run; none for files in the run's directory.
    """
    if isinstance(logger, WandbLogger):
        return wandb_run.NAME, wandb_run.finish(logger.experiment, results, directory, settings, store)
    if isinstance(logger, MLflowRun):
        return mlflow_run.NAME, mlflow_run.finish(logger, results, directory, settings, store)
    if isinstance(logger, TensorBoardLogger):
        board.finish(logger, results, directory, settings)
    return None
