"""Turn a dense model into a Mixture-of-Experts: ``python -m dive.train model=llama2-7b moe.experts=8``.

Without an override it takes the model and the texts that come with the package, for minutes on a CPU.

Most used::

  model=smollm2-135m                      a model of the hub, or your own:
    model=local model.path=DIR            a checkpoint, or a GGUF file
  calibration_domains=local               your own text:
    calibration_domains.path=DIR          DIR/<domain>/{train,test}.jsonl|txt|parquet
  pruning.ratio=0.75 moe.experts=8        how narrow experts become, how many there
    moe.top_k=1                           are, and how many each token uses
  budget=minutes                          how much of everything: a first look;
                                          hours for a model to keep
  hydra.run.dir=outputs/mine              where the results go

An example, your model and your text at a first look::

  python -m dive.train model=local model.path=DIR budget=minutes eval=default \\
    calibration_domains=local calibration_domains.path=DIR hydra.run.dir=outputs/mine

What it will cost: ``python -m dive.plan`` with the same overrides. All there is to set: ``--help GROUP`` for each group below,
``--cfg job --resolve`` for the whole configuration.
"""

import logging
from pathlib import Path

from dive.cli import require_loggers, require_tasks, run
from dive.config import Config, LoggerConfig, TextSource
from dive.model.architecture import local_model
from dive.progress import show
from dive.trainer.rank import process_rank

log = logging.getLogger(__name__)


def main(config: Config) -> float:
    """Run the whole method; returns the last stage's perplexity, which a sweeper can minimise."""
    local_model(config.model.path)  # before the heavy imports
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from dive.budgets import budget_line, plan_here

    hydra = HydraConfig.get()
    if process_rank() == 0:
        log.info("%s, into %s", beginning(config), hydra.runtime.output_dir)
    require_tasks(config.eval)
    require_loggers(config.logger)
    from dive.pipeline import train  # takes seconds, in which the line above is there to read

    if process_rank() == 0:
        show(budget_line(plan_here(config)))
    if hydra.mode is RunMode.MULTIRUN:
        name_job(config.logger, f"sweep {Path(hydra.sweep.dir).as_posix()}", hydra.job.override_dirname)
    results = train(config, Path(hydra.runtime.output_dir), list(hydra.overrides.task))
    return results.stages[-1].mean if results.stages else float("nan")


def name_job(logger: LoggerConfig, sweep: str, job: str) -> None:
    """A sweep is one group or one experiment of a tracker, and its jobs have names, where none are given."""
    if logger.wandb is not None:
        logger.wandb.group, logger.wandb.name = logger.wandb.group or sweep, logger.wandb.name or job
    if logger.mlflow is not None:
        logger.mlflow.experiment, logger.mlflow.name = logger.mlflow.experiment or sweep, logger.mlflow.name or job


def beginning(config: Config) -> str:
    """What a run reads, in one line."""
    domains = config.calibration_domains
    text = domains.path if domains.source is TextSource.local else f"{domains.source.value} domains"
    only = f" ({', '.join(domains.domains)})" if domains.domains else ""
    at = f" ({config.model.path})" if config.model.path != config.model.name else ""
    return f"begins: model {config.model.name}{at}, text from {text}{only}"


def command() -> None:
    """Compose the command line and do it."""
    run(main, "config", Config)


if __name__ == "__main__":
    command()
