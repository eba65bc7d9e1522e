"""The workspace of a W&B project: named sections over what :mod:`dive.logger` logs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

PARAMETERS = ("dense", "total", "active", "trained")


def workspace(
    entity: str, project: str, *, name: str, measured: Sequence[str], retrained: Sequence[str]
) -> "Workspace":
    """Results, affinity and routing, retraining over tokens, experts, cost; one section each.

    Args:
        measured: names of all the stages, in order.
        retrained: those of them that trained.
    """
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws

    def over_tokens(title: str, metric: str, log_y: bool | None = None) -> list[wr.LinePlot]:
        return [
            wr.LinePlot(
                title=f"{stage}: {title}", x=f"{stage}/tokens", y=[f"{stage}/{metric}"], title_x="tokens", log_y=log_y
            )
            for stage in retrained
        ]

    def by_layer(title: str, pattern: str) -> list[wr.LinePlot]:
        return [
            wr.LinePlot(
                title=f"{stage}: {title}", x=f"{stage}/tokens", metric_regex=f"{stage}/{pattern}", title_x="tokens"
            )
            for stage in retrained
        ]

    results = ws.Section(
        name="Results",
        is_open=True,
        panels=[
            wr.BarPlot(title="Perplexity after each stage", metrics=[f"eval/{stage}/mean" for stage in measured]),
            wr.ScalarChart(title="Final perplexity", metric=wr.SummaryMetric("final/perplexity")),
            wr.ScalarChart(title="Over the dense model", metric=wr.SummaryMetric("final/perplexity_over_dense")),
            wr.ScatterPlot(
                title="Perplexity against active parameters",
                x=wr.SummaryMetric("parameters/active"),
                y=wr.SummaryMetric("final/perplexity"),
            ),
            wr.WeavePanelSummaryTable(table_name="results/stages"),
            wr.WeavePanelSummaryTable(table_name="results/perplexity"),
        ],
    )
    affinity = ws.Section(
        name="Affinity and routing",
        is_open=True,
        panels=[
            wr.MediaBrowser(title="Affinity of the domains", media_keys=["figures/affinity"]),
            wr.MediaBrowser(title="Share of each domain's tokens by expert", media_keys=["figures/routing"]),
            wr.WeavePanelSummaryTable(table_name="affinity/groups"),
            wr.WeavePanelSummaryTable(table_name="affinity/perplexity"),
            wr.WeavePanelSummaryTable(table_name="routing/share"),
        ],
    )
    retraining = ws.Section(
        name="Retraining",
        is_open=True,
        panels=[
            *over_tokens("loss (nats a token)", "loss"),
            *over_tokens("perplexity", "perplexity", log_y=True),
            *over_tokens("learning rate", "learning_rate"),
        ],
    )
    experts = ws.Section(
        name="Experts",
        panels=[
            *by_layer("entropy of each router (nats)", "router_entropy/.*"),
            *by_layer("load of each expert (share)", "expert_load/.*"),
        ],
    )
    cost = ws.Section(
        name="Cost",
        panels=[
            *over_tokens("tokens a second", "tokens_per_second"),
            wr.BarPlot(title="Parameters", metrics=[f"parameters/{part}" for part in PARAMETERS]),
            wr.BarPlot(title="Seconds", metrics=[f"seconds/{stage}" for stage in (*measured, "total")]),
        ],
    )
    return ws.Workspace(
        entity=entity, project=project, name=name, sections=[results, affinity, retraining, experts, cost]
    )
