"""The workspace of a W&B project: named sections over what :mod:`dive.logger` logs."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from dive.logger import keys

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

PARAMETERS = ("dense", "total", "active", "trained")
WHEN = ("planned", "actual")
TABLES = (
    *("results/stages", "results/perplexity", "results/tasks", "results/parameters", "results/cost"),
    *("affinity/mapped", "affinity/similarity", "routing/share", "routing/load"),
)
"""Tables of a run of the defaults that evaluates on tasks; see :mod:`dive.logger.tables`."""


def workspace(
    entity: str,
    project: str,
    *,
    name: str,
    measured: Sequence[str],
    retrained: Sequence[str],
    tables: Collection[str] = TABLES,
) -> "Workspace":
    """Results, affinity and routing, retraining over tokens, experts, cost; one section each.

    Args:
        measured: names of all the stages, in order.
        retrained: those of them that trained.
        tables: names of those that the runs log.
    """
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws

    def over_tokens(title: str, metric: str, log_y: bool | None = None) -> list[wr.LinePlot]:
        return [
            wr.LinePlot(
                title=f"{stage}: {title}",
                x=keys.of(stage, keys.TOKENS),
                y=[keys.of(stage, metric)],
                title_x="tokens",
                log_y=log_y,
            )
            for stage in retrained
        ]

    def by_layer(title: str, metric: str) -> list[wr.LinePlot]:
        return [
            wr.LinePlot(
                title=f"{stage}: {title}",
                x=keys.of(stage, keys.TOKENS),
                metric_regex=keys.of(stage, metric, ".*"),
                title_x="tokens",
            )
            for stage in retrained
        ]

    def of_stages(metric: str, *of_what: str) -> list[Any]:
        return [keys.of(stage, metric, *of_what) for stage in measured]

    def tables_of(*sections: str) -> list[wr.WeavePanelSummaryTable]:
        found = [name for name in tables if name.startswith(sections)]
        return [wr.WeavePanelSummaryTable(table_name=name) for name in found]

    final = keys.of(keys.FINAL, "perplexity")
    seconds = keys.of(keys.FINAL, keys.SECONDS)

    results = ws.Section(
        name="Results",
        is_open=True,
        panels=[
            wr.BarPlot(title="Perplexity after each stage", metrics=of_stages(keys.EVALUATED, "mean")),
            wr.ScalarChart(title="Final perplexity", metric=final),
            wr.ScalarChart(title="Over the dense model", metric=keys.of(keys.FINAL, "perplexity_over_dense")),
            wr.ScatterPlot(
                title="Perplexity against active parameters",
                x=wr.SummaryMetric(keys.of(keys.PARAMETERS, "active")),
                y=wr.SummaryMetric(final),
            ),
            *tables_of("results/stages", "results/perplexity", "results/tasks"),
        ],
    )
    affinity = ws.Section(
        name="Affinity and routing",
        is_open=True,
        panels=[
            wr.MediaBrowser(title="Affinity of the domains", media_keys=["figures/affinity"]),
            wr.MediaBrowser(title="Share of each domain's tokens by expert", media_keys=["figures/routing"]),
            *tables_of("affinity/", "routing/share"),
        ],
    )
    retraining = ws.Section(
        name="Retraining",
        is_open=True,
        panels=[
            *over_tokens("loss (nats a token)", keys.LOSS),
            *over_tokens("perplexity", keys.TEXT_PERPLEXITY, log_y=True),
            *over_tokens("learning rate", keys.LEARNING_RATE),
        ],
    )
    experts = ws.Section(
        name="Experts",
        panels=[
            *by_layer("entropy of each router (nats)", keys.ENTROPY),
            *by_layer("load of each expert (share)", keys.LOAD),
            *tables_of("routing/load"),
        ],
    )
    cost = ws.Section(
        name="Cost",
        panels=[
            *over_tokens("tokens a second", keys.SPEED),
            wr.BarPlot(title="Parameters", metrics=[keys.of(keys.PARAMETERS, part) for part in PARAMETERS]),
            wr.BarPlot(title="Seconds", metrics=[*of_stages(keys.SECONDS), seconds]),
            wr.BarPlot(title="Seconds of the whole run", metrics=[keys.of(keys.COST, f"{w}_seconds") for w in WHEN]),
            *tables_of("results/parameters", "results/cost"),
        ],
    )
    return ws.Workspace(
        entity=entity, project=project, name=name, sections=[results, affinity, retraining, experts, cost]
    )
