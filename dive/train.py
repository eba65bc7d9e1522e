"""Dense model in, Mixture-of-Experts out: ``python -m dive.train model=llama2-7b moe.experts=8``.

Most used::

  model=tinyllama                         a preset of the hub
  model=local model.path=DIR              your own checkpoint, or a GGUF file
  calibration_domains=local               your own text: in the directory
    calibration_domains.path=DIR          <domain>/{train,test}.jsonl|txt|parquet
  pruning.ratio=0.75                      share of each FFN that is removed
  moe.experts=8 moe.top_k=1               experts, and how many a token uses
  affinity=mined                          begin with mined groups of domains
  budget=minutes                          or hours, paper: how much of everything
  retrain=none                            or default, full, lora, two_stages
  retrain.stages.experts.tokens=1000000   how long it is retrained
  trainer=gpu                             or cpu, ddp, fsdp, fsdp2
  'eval.tasks=[piqa,arc_easy]'            tasks beside perplexity
  experiment=paper_1_8                    the paper's recipe to the letter
  hydra.run.dir=DIR                       where the results go

What a run will cost: ``python -m dive.plan`` with the same overrides.
"""

import logging
from pathlib import Path

from dive.cli import require_extra, require_tasks, run
from dive.config import Config, TextSource
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
    if config.logger.tensorboard is not None:
        require_extra(
            "tensorboard", "tensorboard", "logger=tensorboard needs TensorBoard", ", or leave it out of logger=[...]"
        )
    from dive.pipeline import train  # takes seconds, in which the line above is there to read

    if process_rank() == 0:
        show(budget_line(plan_here(config)))
    if hydra.mode is RunMode.MULTIRUN and config.logger.wandb is not None:  # a sweep is one group, its jobs are named
        config.logger.wandb.group = config.logger.wandb.group or f"sweep {Path(hydra.sweep.dir).as_posix()}"
        config.logger.wandb.name = config.logger.wandb.name or hydra.job.override_dirname
    results = train(config, Path(hydra.runtime.output_dir), list(hydra.overrides.task))
    return results.stages[-1].mean if results.stages else float("nan")


def beginning(config: Config) -> str:
    """What a run reads, in one line."""
    domains = config.calibration_domains
    text = domains.path if domains.source is TextSource.local else f"{domains.source.value} domains"
    only = f" ({', '.join(domains.domains)})" if domains.domains else ""
    at = f" ({config.model.path})" if config.model.path != config.model.name else ""
    return f"begins: model {config.model.name}{at}, text from {text}{only}"


if __name__ == "__main__":
    run(main, "config", Config)
