"""The page of one run: ``report.html``, from what the run's directory holds.

Shapes: n domains, E experts, L layers.
"""

import csv
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import dendrogram

from dive.affinity.grouping import affinity
from dive.engines.table import figures as engine_figures
from dive.engines.verified import Verified, read_verified
from dive.errors import UserError
from dive.eval.tasks import headline
from dive.report.page import embedded, write_page
from dive.report.plots import FIGURES
from dive.report.text import asked_with, model_name
from dive.results import Results, Spent, SpentStage, read_results, to_json

POINTS = 300
"""Points of a curve that are drawn, at most."""
OF_EXPERT = re.compile(r"(?P<metric>.+)/layer_(?P<layer>\d+)/expert_(?P<expert>\d+)")
NAMED_FROM = 1.5
"""A domain names an expert that gets at least as many times the mean domain's share of it."""
OF_LAYER = re.compile(r"(?P<metric>.+)/layer_(?P<layer>\d+)")


def write_report(directory: Path) -> Path:
    """Write ``report.html`` of a run.

    Raises:
        UserError: the directory holds no results, or those of a finished model that was only measured.
    """
    results = read_results(directory)
    if "moe" not in results.run.config:
        raise UserError(f"{directory}: a finished model was measured here; a report is written of what dive.train ran")
    if not results.stages:
        raise UserError(f"{directory}: results.json has no stage yet; run the same command again to go on")
    curves = read_curves(directory, [stage.name for stage in results.stages])
    config_file = directory / "config.yaml"
    data = figures(results, curves)
    return write_page(
        directory / "report.html",
        "report.html",
        script="report.js",
        data=data,
        results=results,
        name=model_name(results.settings),
        config=results.run.config,
        config_text=config_file.read_text(encoding="utf-8") if config_file.is_file() else None,
        command=shlex.join(results.run.command),
        stages=stage_rows(results),
        built=results.stages[-1] not in (results.dense, results.pruned),
        experts=expert_rows(results),
        own_share=own_share(results),
        highest_entropy=math.log(results.settings["moe.experts"]),
        recovered=recovered(results),
        domains=domain_rows(results),
        tasks=task_rows(results),
        task_figure=bool(data["tasks"]),
        followed=bool(data["texts"]),
        plan=plan_rows(results),
        verified=(verified := read_verified(directory)),
        engines=[] if verified is None else engine_rows(verified),
        contaminated=contaminated_rows(results),
        own_groups=has_own_groups(results),
        mined_groups=group_rows(results),
        calibration_tokens=results.calibration_tokens,
        seconds=computing_seconds(results),
        has_curves=bool(curves),
        images=images(directory),
    )


def images(directory: Path) -> list[tuple[str, str, str]]:
    """(name, picture as a data URL, caption) of the figures that the page does not draw itself."""
    files = {name: directory / "plots" / f"{name}.png" for name in FIGURES}
    return [
        (name, embedded(files[name]), plot.caption)
        for name, plot in FIGURES.items()
        if plot.caption is not None and files[name].is_file()
    ]


# --------------------------------------------------------------------------------------------------------------- tables


def stage_rows(results: Results) -> list[dict[str, Any]]:
    """What each stage reached and cost; parameters are null where an older run did not record them."""
    sizes = [results.size_of(stage) for stage in results.stages]
    return [
        {
            **{
                key: getattr(stage, key)
                for key in ("name", "label", "tokens", "calibration", "seconds", "reused", "trained")
            },
            "perplexity": stage.mean,
            "sets": {name: stage.perplexity.get(name) for name in results.evaluation.sets},
            "active": active,
            "total": total,
        }
        for stage, (active, total) in zip(results.stages, sizes, strict=True)
    ]


def computing_seconds(results: Results) -> float:
    """What the run's stages took, whenever each was computed; of a run under way, without evaluation."""
    if results.plan is not None:
        return results.plan.actual.seconds
    mining = (results.affinity.seconds if results.affinity is not None else None) or 0.0
    return mining + sum(stage.seconds for stage in results.stages if stage is not results.dense)


def recovered(results: Results) -> float | None:
    """Share of the loss in nats per token, pruned against dense, that the last model wins back."""
    dense, pruned, last = results.dense, results.pruned, results.stages[-1]
    if dense is None or pruned is None or last in (dense, pruned) or pruned.mean <= dense.mean:
        return None
    lost, left = math.log(pruned.mean / dense.mean), math.log(last.mean / dense.mean)
    return (lost - left) / lost


def expert_rows(results: Results) -> list[dict[str, Any]]:
    """For each expert its name, the domains it was built from, those whose tokens it gets, and the tokens that set it apart."""
    share, groups = results.share, results.groups or []
    if not share:
        return []
    tokens = (results.routing.tokens if results.routing is not None else None) or []
    experts = len(next(iter(share.values())))
    rows = []
    for number in range(experts):
        load = float(np.mean([values[number] for values in share.values()]))
        served = sorted(share, key=lambda domain: -share[domain][number])
        first = [domain for domain in served if max(share[domain]) == share[domain][number]]
        rows.append(
            {
                "number": number,
                "name": ", ".join([d for d in served if share[d][number] >= NAMED_FROM * load > 0][:2]) or "mixed",
                "built_from": groups[number] if has_own_groups(results) else [],
                "first_choice_of": first,
                "served": [(domain, share[domain][number]) for domain in served[:3]],
                "load": load,
                "tokens": [visible(token.text) for token in tokens[number] if token.text] if tokens else [],
            }
        )
    return rows


def visible(token: str) -> str:
    """What a token reads, with marks for spaces, tabs and line ends."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def has_own_groups(results: Results) -> bool:
    """Whether each expert began with a group of domains of its own."""
    experts = len(next(iter(results.share.values()), []))
    return experts > 1 and len(results.groups or []) == experts


def own_share(results: Results) -> float | None:
    """Share of a domain's assignments that its own expert gets, mean over domains; none where groups are not experts."""
    share, groups = results.share, results.groups or []
    if not has_own_groups(results):
        return None
    own = [share[domain][number] for number, group in enumerate(groups) for domain in group if domain in share]
    return float(np.mean(own)) if own else None


def domain_rows(results: Results) -> list[dict[str, Any]]:
    """Perplexity of every domain at every stage, at the length of the headline."""
    length = headline_length(results)
    expert = {domain: number for number, group in enumerate(results.groups or []) for domain in group}
    return [
        {
            "domain": domain,
            "expert": expert.get(domain),
            "perplexity": [stage.perplexity.get(f"{domain}@{length}") for stage in results.stages],
        }
        for domain in results.evaluation.domains
    ]


def headline_length(results: Results) -> int:
    """Tokens of the windows that the headline mean is taken at."""
    return int(results.settings["eval.lengths"][0])


def task_rows(results: Results) -> list[dict[str, Any]]:
    """Scores of evaluation tasks, where they were measured: a row a task and metric, (value, standard error) a stage."""
    scores = [stage.tasks or {} for stage in results.stages]
    names = {
        (task, metric): None
        for found in scores
        for task, metrics in found.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "_stderr" not in metric
    }
    rows = []
    for task, metric in names:
        name, comma, behind = metric.partition(",")
        error = f"{name}_stderr{comma}{behind}"
        of_task = [found.get(task, {}) for found in scores]
        rows.append({"task": task, "metric": metric, "scores": [(m.get(metric), m.get(error)) for m in of_task]})
    return rows


def task_figure(results: Results) -> list[dict[str, Any]]:
    """Each task's own metric where it is a share, {value, error} or null a stage; last, the mean of the tasks with its error."""
    scores = {(row["task"], row["metric"]): row["scores"] for row in task_rows(results)}
    rows = []
    for task in dict.fromkeys(task for task, _ in scores):
        metrics = {metric: 0.0 for name, metric in scores if name == task}
        asked = asked_with(results.evaluation.tasks, task)
        metric, _ = headline(metrics, None if asked is None else asked.metric)
        found = [value for value, _ in scores[task, metric] if value is not None]
        if all(0 <= value <= 1 for value in found):
            rows.append({"task": task, "metric": metric.partition(",")[0], "scores": scores[task, metric]})
    if len(rows) > 1:
        of_stage = zip(*(row["scores"] for row in rows), strict=True)
        rows.append({"task": "mean", "metric": "", "scores": [mean_score(values) for values in of_stage]})
    return [row | {"scores": [_drawn(*score) for score in row["scores"]]} for row in rows]


def _drawn(value: float | None, error: Any) -> dict[str, float | None]:
    """A score as the figure takes it; the harness writes words where it has no error."""
    return {"value": value, "error": error if isinstance(error, int | float) else None}


def mean_score(scores: Sequence[tuple[float | None, Any]]) -> tuple[float | None, float | None]:
    """Mean of the tasks, and its standard error where each has one, as of independent questions."""
    values = [value for value, _ in scores if value is not None]
    errors = [error for _, error in scores if isinstance(error, int | float)]
    if len(values) < len(scores):
        return None, None
    return float(np.mean(values)), math.hypot(*errors) / len(errors) if len(errors) == len(scores) else None


def contaminated_rows(results: Results) -> list[dict[str, Any]]:
    """Texts that were measured and stand in part in the training text, the largest share of documents first."""
    found = results.contamination
    rows = [
        {"kind": kind, "name": name, **to_json(overlap)}
        for kind, texts in (("domain", found.domains), ("set", found.sets), ("task", found.tasks))
        for name, overlap in (texts or {}).items()
        if overlap.found
    ]
    return sorted(rows, key=lambda row: -row["share"])


def plan_rows(results: Results) -> list[dict[str, Any]]:
    """What was planned of each stage and of the whole run beside what it took: (planned, actual) seconds and bytes."""
    if results.plan is None:
        return []
    planned, actual = results.plan.planned, results.plan.actual
    took = {stage.name: stage for stage in actual.stages}
    figures = ("seconds", "host_bytes", "device_bytes", "disk_bytes")

    def row(name: str, flops: float | None, plan: Any, spent: SpentStage | Spent | None) -> dict[str, Any]:
        return {
            "name": name,
            "flops": flops,
            "reused": isinstance(spent, SpentStage) and spent.reused,
            **{figure: (getattr(plan, figure), getattr(spent, figure, None)) for figure in figures},
        }

    whole = row("whole run", None, planned, actual)
    whole["disk_bytes"] = (planned.disk_bytes.store + planned.disk_bytes.export, actual.disk_bytes)
    return [*(row(stage.name, stage.flops, stage, took.get(stage.name)) for stage in planned.stages), whole]


def engine_rows(verified: Verified) -> list[dict[str, Any]]:
    """What each engine made of the export."""
    return [
        {
            "engine": found.engine,
            "version": found.version or "–",
            "figures": engine_figures(verified, found),
            "verdict": found.verdict,
            "reason": found.reason,
        }
        for found in verified.engines
    ]


# -------------------------------------------------------------------------------------------------------------- figures


def figures(results: Results, curves: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page draws."""
    return {
        "groups": results.groups or [],
        "stages": [{"name": stage.name, "label": stage.label} for stage in results.stages],
        "domains": domain_rows(results),
        "tasks": task_figure(results),
        "names": [row["name"] for row in expert_rows(results)],
        "affinity": affinity_figure(results),
        "overlap": results.overlap,
        "layers": None if results.routing is None else results.routing.layers,
        "routing": None if results.routing is None else results.routing.share_by_layer,
        "texts": text_figure(results),
        "curves": curves,
    }


def text_figure(results: Results) -> list[dict[str, Any]]:
    """Each domain's beginning of a test text: its tokens (T,), and the expert of each in every layer (L, T)."""
    texts = (results.routing.texts if results.routing is not None else None) or []
    return [
        {
            "domain": text.domain,
            "tokens": text.tokens,
            "experts": [list(map(int, line.split())) for line in text.experts],
        }
        for text in texts
        if text.tokens
    ]


def mined_groups(results: Results) -> list[list[str]]:
    """Groups of the affinity map; an older run's are those its experts began with."""
    mined = results.affinity
    return [] if mined is None else mined.groups or results.groups or []


def group_rows(results: Results) -> list[dict[str, Any]]:
    """For each group of the affinity map its domains, and the experts that get most of their tokens."""
    share = results.share
    return [
        {
            "number": number,
            "domains": members,
            "experts": sorted({int(np.argmax(share[domain])) for domain in members if domain in share}),
        }
        for number, members in enumerate(mined_groups(results))
    ]


def affinity_figure(results: Results) -> dict[str, Any] | None:
    """Affinities (n, n), the cross-domain perplexities they come from if they do, and the tree; none if nothing was mined."""
    mined = results.affinity
    if mined is None:
        return None
    domains = mined.domains
    groups = mined_groups(results)
    figure: dict[str, Any] = {"domains": domains, "groups": groups, "perplexity": mined.perplexity, "tree": None}
    figure["affinity"] = mined.similarity if mined.perplexity is None else affinity(mined.perplexity).tolist()
    group = {domain: number for number, members in enumerate(groups) for domain in members}
    if mined.tree is None:
        figure["order"] = sorted(range(len(domains)), key=lambda i: group.get(domains[i], len(domains)))
        return figure
    tree = np.array(mined.tree)
    below: list[set[int | None]] = [{group.get(domain)} for domain in domains]
    for left, right, *_ in tree:
        below.append(below[int(left)] | below[int(right)])

    def owner(node: int) -> str:
        """The group all of a node's domains are in."""
        found = next(iter(below[node])) if len(below[node]) == 1 else None
        return "" if found is None else str(found)

    drawn = dendrogram(tree, no_plot=True, link_color_func=owner)
    links = zip(drawn["icoord"], drawn["dcoord"], drawn["color_list"], strict=True)
    figure["order"] = drawn["leaves"]
    figure["tree"] = [{"at": at, "distance": distance, "group": owner} for at, distance, owner in links]
    return figure


def read_curves(directory: Path, stages: Sequence[str]) -> list[dict[str, Any]]:
    """Logged values of every stage that ``csv/<stage>/metrics.csv`` has, thinned to at most ``POINTS`` points.

    ``<metric>`` becomes a curve, ``<metric>/layer_<n>`` one a layer, ``<metric>/layer_<n>/expert_<e>`` one an expert and layer.
    ``tokens`` counts on from stage to stage.
    """
    found: list[dict[str, Any]] = []
    before = 0.0
    for stage in stages:
        file = directory / "csv" / stage / "metrics.csv"
        if not file.is_file():
            continue
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        columns = (
            {name.removeprefix(f"{stage}/"): [to_number(row[name]) for row in rows] for name in rows[0]} if rows else {}
        )
        tokens = columns.get("tokens")
        if tokens is None or None in tokens:
            continue
        kept = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), POINTS)).round().astype(int))
        curve: dict[str, Any] = {"stage": stage, "scalars": {}, "layers": {}, "experts": {}}
        curve["tokens"] = [before + float(tokens[i]) for i in kept]
        for name, values in columns.items():
            thinned = [values[i] for i in kept]
            if match := OF_EXPERT.fullmatch(name):
                layer = curve["experts"].setdefault(match["metric"], {}).setdefault(int(match["layer"]), {})
                layer[int(match["expert"])] = thinned
            elif match := OF_LAYER.fullmatch(name):
                curve["layers"].setdefault(match["metric"], {})[int(match["layer"])] = thinned
            elif name not in ("step", "tokens"):
                curve["scalars"][name] = thinned
        before = curve["tokens"][-1]
        found.append(curve)
    return found


def to_number(text: str | None) -> float | None:
    """A cell of a csv file; none where it is empty or no number."""
    try:
        return float(text) if text else None
    except ValueError:
        return None
