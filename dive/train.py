"""Dense model in, Mixture-of-Experts out: ``python -m dive.train model=llama2-7b moe.experts=8``."""

from dive.cli import run
from dive.config import Config


def main(config: Config) -> None:
    """Run the whole method."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from dive.pipeline import run as run_pipeline

    hydra = HydraConfig.get()
    run_pipeline(config, Path(hydra.runtime.output_dir), list(hydra.overrides.task))


if __name__ == "__main__":
    run(main, "config", Config)
