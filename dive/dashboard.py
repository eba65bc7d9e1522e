"""Make a workspace in Weights & Biases for a project's runs: ``python -m dive.dashboard entity=ME project=dive``."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from dive.cli import require_extra, run
from dive.errors import UserError, require


@dataclass(slots=True, kw_only=True)
class DashboardConfig:
    """Which project, and the retraining stages that its runs have."""

    entity: str = MISSING
    """User or team."""
    project: str = "dive"
    """Project that the runs are logged to."""
    name: str = "DIVE"
    """Name of the workspace."""
    stages: list[str] = field(default_factory=lambda: ["retrain"])
    """Names of the retraining stages, in order; the paper's recipes have router, retrain and further."""
    results: str | None = None
    """Directory of a run, whose stages are shown in place of ``stages``, and whose tables in place of those of most runs."""
    dry_run: bool = False
    """List the sections and their panels, and save nothing."""

    def __post_init__(self) -> None:
        require(len(set(self.stages)) == len(self.stages), "stages names a stage twice")


def dashboard(config: DashboardConfig) -> None:
    """Save the workspace and print its address.

    Raises:
        UserError: ``results`` is no run's, wandb-workspaces is not installed, nobody is logged in, or W&B refuses.
    """
    from pathlib import Path

    require_extra("wandb_workspaces", "dashboard", "dive.dashboard needs wandb-workspaces")
    from dive.logger.dashboard import TABLES, workspace
    from dive.logger.tables import tables
    from dive.logger.wandb_run import wandb_logged_in
    from dive.progress import show
    from dive.results import LABELS, read_results

    measured, retrained, shown = [*LABELS, *config.stages], list(config.stages), list(TABLES)
    if config.results is not None:
        results = read_results(Path(config.results))
        measured = [stage.name for stage in results.stages]
        retrained, shown = [stage.name for stage in results.stages if stage.tokens], list(tables(results))
    made = workspace(
        config.entity, config.project, name=config.name, measured=measured, retrained=retrained, tables=shown
    )
    for section in made.sections:
        show(f"{section.name}: {len(section.panels)} panels")
    if config.dry_run:
        show("dry_run=true: nothing saved")
        return
    if not wandb_logged_in():
        raise UserError("nobody is logged in to W&B; run `wandb login`, or set dry_run=true to look")
    import requests
    import wandb

    try:
        show(made.save().url)
    except (wandb.Error, wandb.errors.CommError, requests.RequestException, ValueError, OSError) as error:
        raise UserError(f"entity={config.entity} project={config.project}: W&B refuses ({error})") from error


def command() -> None:
    """Compose the command line and do it."""
    run(dashboard, "dashboard", DashboardConfig)


if __name__ == "__main__":
    command()
