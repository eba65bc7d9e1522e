"""What the next smaller and the next larger budget would cost: the same command line, composed and planned once more for each."""

import json
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig

from dive.cli import composed
from dive.config import Config
from dive.errors import UserError
from dive.model.architecture import locate_architecture
from dive.plan.stages import Plan, plan
from dive.units import count, duration


def plan_here(config: Config) -> Plan:
    """The plan on the device that ``plan.device`` names, or that the run would take on this machine."""
    device = None
    if config.plan.device == config.trainer.accelerator == "auto":
        import torch

        device = None if torch.cuda.is_available() else "cpu"
    return plan(config, locate_architecture(config.model), device=device)


def budget_line(planned: Plan) -> str:
    """The plan's budget, and what its neighbours would take on the same device; for a command that Hydra runs."""
    hydra = HydraConfig.get()
    places = [f"file://{source.path}" for source in hydra.runtime.config_sources if source.provider == "command-line"]
    searched = [override for override in hydra.overrides.hydra if override.startswith("hydra.searchpath=")]
    if places:
        searched = [f"hydra.searchpath=[{','.join(json.dumps(place) for place in places)}]"]
    overrides = [*hydra.overrides.task, *searched]
    budget = planned.job.config.budget
    line = f"budget   {budget.name}"
    for name in filter(None, (budget.smaller, budget.larger)):
        try:
            other = plan(_with(name, overrides), planned.job.architecture, device=planned.job.device_name)
        except UserError:
            continue  # it does not go with the other overrides: a batch that does not divide among the devices
        line += f"; budget={name} trains on {count(other.retraining_tokens)} tokens and takes about {duration(other.seconds)}"
    return line


def _with(budget: str, overrides: Sequence[str]) -> Config:
    return composed([*(o for o in overrides if o.partition("=")[0] != "budget"), f"budget={budget}"])
