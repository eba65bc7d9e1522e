"""What a run found, as tables that trackers show."""

from typing import Any, TypeAlias

from dive.logger.keys import costs
from dive.results import Results, to_json

Table: TypeAlias = tuple[list[str], list[list[Any]]]
"""(columns, rows)"""


def tables(results: Results) -> dict[str, Table]:
    """{section/name: table}; one for which a run has no data is left out."""
    made = {
        "results/stages": _stages(results),
        "results/perplexity": _perplexity(results),
        "results/tasks": _tasks(results),
        "results/parameters": (["parameters of", "count"], [[*row] for row in to_json(results.parameters).items()]),
        "results/cost": _cost(results),
        **_affinity(results),
        **_routing(results),
    }
    return {name: table for name, table in made.items() if table[1]}


def markdown(table: Table) -> str:
    """A table as Markdown, floats at four significant digits."""
    columns, rows = table
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _stages(results: Results) -> Table:
    columns = ["stage", "perplexity", "trained parameters", "tokens", "calibration", "seconds"]
    return columns, [[s.name, s.mean, s.trained, s.tokens, s.calibration, s.seconds] for s in results.stages]


def _perplexity(results: Results) -> Table:
    stages = results.stages
    keys = [key for key in stages[0].perplexity if not key.startswith("mean")] if stages else []
    return ["text", *(stage.name for stage in stages)], [[key, *(s.perplexity[key] for s in stages)] for key in keys]


def _tasks(results: Results) -> Table:
    stages = results.stages
    asked = dict.fromkeys((task, m) for stage in stages for task, found in (stage.tasks or {}).items() for m in found)
    rows = [
        [task, metric, *((stage.tasks or {}).get(task, {}).get(metric) for stage in stages)] for task, metric in asked
    ]
    return ["task", "metric", *(stage.name for stage in stages)], rows


def _cost(results: Results) -> Table:
    """Planned beside actual, a stage a row, then the whole run."""
    measures = ("seconds", "host_bytes", "device_bytes", "disk_bytes")
    columns = [f"{when} {what}" for what in measures for when in ("planned", "actual")]
    if results.plan is None:
        return ["stage", *columns], []
    planned, actual = results.plan.planned, results.plan.actual
    took = {stage.name: stage for stage in actual.stages}
    rows: list[list[Any]] = []
    for stage in planned.stages:
        spent = took.get(stage.name)
        row = [(getattr(stage, what), getattr(spent, what, None)) for what in measures]
        rows.append([stage.name, *(value for pair in row for value in pair)])
    whole = zip(costs(planned).values(), costs(actual).values(), strict=True)
    return ["stage", *columns], [*rows, ["whole run", *(value for pair in whole for value in pair)]]


def _affinity(results: Results) -> dict[str, Table]:
    made: dict[str, Table] = {}
    made["affinity/groups"] = (["expert", "domains"], _members(results.groups or []))
    mined = results.affinity
    if mined is None:
        return made
    if mined.groups is not None and mined.groups != results.groups:
        made["affinity/mapped"] = (["group", "domains"], _members(mined.groups))
    for measure, matrix in (("perplexity", mined.perplexity), ("similarity", mined.similarity)):
        if matrix is not None:
            rows = [[domain, *row] for domain, row in zip(mined.domains, matrix, strict=True)]
            made[f"affinity/{measure}"] = (["pruned on", *mined.domains], rows)
    return made


def _members(groups: list[list[str]]) -> list[list[Any]]:
    return [[number, ", ".join(group)] for number, group in enumerate(groups)]


def _routing(results: Results) -> dict[str, Table]:
    """Share of each domain's tokens by layer and expert, and how even the experts' loads are in each layer."""
    routing = results.routing
    if routing is None:
        return {}
    shares = [
        [domain, layer, expert, share]
        for domain, layers in (routing.share_by_layer or {}).items()
        for layer, experts in zip(routing.layers or range(len(layers)), layers, strict=True)
        for expert, share in enumerate(experts)
    ]
    most, entropy = routing.load_max_over_mean or [], routing.load_entropy or []
    numbers = (routing.layers or range(len(most))) if most else []
    return {
        "routing/share": (["domain", "layer", "expert", "share of tokens"], shares),
        "routing/load": (
            ["layer", "largest load over mean", "entropy of the load (nats)"],
            [[*row] for row in zip(numbers, most, entropy, strict=True)],
        ),
    }
