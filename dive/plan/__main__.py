"""Say what a run will cost, before it runs: ``python -m dive.plan model=llama2-7b moe.experts=8``.

It takes every override of ``python -m dive.train``. Its own, the most used first::

  plan.device=a100-80                     the device to plan for: h100, a100-80, rtx4090, cpu
  plan.table=memory                       what fills the memory; construction: cost of building the experts
  plan.cores=1                            cores of a CPU
"""

from pathlib import Path

from dive.cli import run
from dive.config import Config


def main(config: Config) -> None:
    """Print the plan; nothing is loaded, asked for or written."""
    from dive.budgets import budget_line, plan_here
    from dive.plan.capacity import Capacity, here
    from dive.plan.table import full_text
    from dive.progress import show

    planned = plan_here(config)
    named = planned.job.device.memory
    on_this_disk = here(Path(config.store), Path("outputs"), device=named)
    show(budget_line(planned), *full_text(planned, on_this_disk if named is None else Capacity(device=named)))


def command() -> None:
    """Compose the command line and do it."""
    run(main, "config", Config, writes=False)


if __name__ == "__main__":
    command()
