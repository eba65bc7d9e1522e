"""Measure perplexity and tasks of any checkpoint: ``python -m dive.evaluate checkpoint=DIR eval.tasks=[piqa]``."""

import logging
from pathlib import Path

from dive.cli import require_tasks, run
from dive.config import EvaluateConfig
from dive.model.architecture import local_model

log = logging.getLogger(__name__)


def main(config: EvaluateConfig) -> None:
    """Measure, write ``results.json`` and print the tables."""
    local_model(config.checkpoint, "checkpoint")  # before the heavy imports
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    domains, tasks = config.calibration_domains, config.eval.tasks
    measured = [*([f"{domains.source.value} domains"] if domains is not None else []), *config.eval.sets, *tasks]
    log.info("begins: checkpoint %s, measured on %s, into %s", config.checkpoint, ", ".join(measured), directory)
    require_tasks(config.eval)
    from dive.pipeline import evaluate  # takes seconds, in which the line above is there to read
    from dive.progress import show
    from dive.report.text import perplexity_table, task_tables

    results = evaluate(config, directory, list(hydra.overrides.task))
    if results.stages[0].perplexity:
        show(perplexity_table(results))
    show(*task_tables(results), f"results  {directory / 'results.json'}")


def command() -> None:
    """Compose the command line and do it."""
    run(main, "evaluate", EvaluateConfig)


if __name__ == "__main__":
    command()
