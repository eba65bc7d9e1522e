"""Dense model in, Mixture-of-Experts out: ``python -m dive.train model=llama2-7b moe.experts=8``."""

from dive.cli import run
from dive.config import Config


def main(config: Config) -> float:
    """Run the whole method; returns the last stage's perplexity, which a sweeper can minimise."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from dive.pipeline import run as run_pipeline

    hydra = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN and config.logger.wandb is not None:  # a sweep is one group, its jobs are named
        config.logger.wandb.group = config.logger.wandb.group or f"sweep {Path(hydra.sweep.dir).as_posix()}"
        config.logger.wandb.name = config.logger.wandb.name or hydra.job.override_dirname
    results = run_pipeline(config, Path(hydra.runtime.output_dir), list(hydra.overrides.task))
    return float(results["stages"][-1]["perplexity"]["mean"]) if results["stages"] else float("nan")


if __name__ == "__main__":
    run(main, "config", Config)
