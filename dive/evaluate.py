"""Perplexity and tasks of any checkpoint: ``python -m dive.evaluate checkpoint=DIR eval.tasks=[piqa]``."""

from dive.cli import run
from dive.config import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    """Measure, write ``results.json`` and print the tables."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from dive.eval.checkpoint import evaluate_checkpoint
    from dive.report.text import perplexity_table, show, task_tables

    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    results = evaluate_checkpoint(config, directory, list(hydra.overrides.task))
    if results["stages"][0]["perplexity"]:
        show(perplexity_table(results))
    show(*task_tables(results), f"results  {directory / 'results.json'}")


if __name__ == "__main__":
    run(main, "evaluate", EvaluateConfig)
