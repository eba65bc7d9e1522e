"""The page of one run: ``report.html``, from what the run's directory holds.

Shapes: n domains, E experts, L layers.
"""

import csv
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import dendrogram

from dive.affinity.grouping import affinity
from dive.errors import UserError
from dive.report.page import write_page

POINTS = 300
"""Points of a curve that are drawn, at most."""
OF_EXPERT = re.compile(r"(?P<metric>.+)/layer_(?P<layer>\d+)/expert_(?P<expert>\d+)")
OF_LAYER = re.compile(r"(?P<metric>.+)/layer_(?P<layer>\d+)")


def write_report(directory: Path) -> Path:
    """Write ``report.html`` of a run.

    Raises:
        UserError: the directory holds no results.
    """
    results = read_results(directory)
    if not results["stages"]:
        raise UserError(f"{directory}: results.json has no stage yet; run the same command again to go on")
    curves = read_curves(directory, [stage["name"] for stage in results["stages"]])
    config_file = directory / "config.yaml"
    return write_page(
        directory / "report.html",
        "report.html",
        script="report.js",
        data=figures(results, curves),
        results=results,
        name=model_name(results["run"]["config"]),
        config=results["run"]["config"],
        config_text=config_file.read_text(encoding="utf-8") if config_file.is_file() else None,
        command=shlex.join(results["run"]["command"]),
        stages=stage_rows(results),
        experts=expert_rows(results),
        own_share=own_share(results),
        highest_entropy=math.log(results["run"]["config"]["moe"]["experts"]),
        recovered=recovered(results),
        domains=domain_rows(results),
        tasks=task_rows(results),
        plan=plan_rows(results),
        contaminated=contaminated_rows(results),
        own_groups=has_own_groups(results),
        calibration_tokens=sum(n * length for n, length in results["run"]["samples"]["calibration"].values()),
        seconds=computing_seconds(results),
        has_curves=bool(curves),
    )


def read_results(directory: Path) -> dict[str, Any]:
    """``results.json`` of a run.

    Raises:
        UserError: it is missing or unreadable.
    """
    file = directory / "results.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name the directory of a run or of a sweep") from error
    except ValueError as error:
        raise UserError(f"{file}: not the results of a run") from error
    if not isinstance(results, dict) or not {"run", "stages"} <= results.keys():
        raise UserError(f"{file}: not the results of a run")
    return results


# --------------------------------------------------------------------------------------------------------------- tables


def stage_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each stage reached and cost; parameters are null where an older run did not record them."""
    sizes = results["parameters"]
    moe = {"active": sizes.get("active"), "total": sizes.get("total")}
    of_stage = {
        "dense": {"active": sizes.get("dense"), "total": sizes.get("dense")},
        "pruned": {"active": sizes.get("pruned"), "total": sizes.get("pruned")},
    }
    return [
        {
            **{key: stage[key] for key in ("name", "tokens", "seconds", "reused", "trained")},
            "label": stage_label(stage["name"]),
            "perplexity": stage["perplexity"]["mean"],
            "sets": {name: stage["perplexity"].get(name) for name in results["evaluation"]["sets"]},
            **of_stage.get(stage["name"], moe),
        }
        for stage in results["stages"]
    ]


def computing_seconds(results: Mapping[str, Any]) -> float:
    """What making every stage took, whenever that was, and mining."""
    mining = float(results.get("affinity", {}).get("seconds", 0.0))
    return mining + sum(float(stage["seconds"]) for stage in results["stages"][1:])


def model_name(config: Mapping[str, Any]) -> str:
    """Of the dense model: its short name, or its directory's."""
    name, path = str(config["model"]["name"]), str(config["model"]["path"])
    return Path(path).name or name if name == "local" else name


def stage_label(name: str) -> str:
    """A stage's name as a reader who has not seen the code understands it."""
    return {"dense": "dense model", "pruned": "pruned, one expert", "reconstructed": "experts, not retrained"}.get(
        name, f"after stage {name}"
    )


def recovered(results: Mapping[str, Any]) -> float | None:
    """Share of the loss in nats per token, pruned against dense, that the last model wins back."""
    mean = {stage["name"]: stage["perplexity"]["mean"] for stage in results["stages"]}
    last = results["stages"][-1]["name"]
    if last in ("dense", "pruned") or "pruned" not in mean or mean["pruned"] <= mean["dense"]:
        return None
    lost, left = np.log(mean["pruned"] / mean["dense"]), np.log(mean[last] / mean["dense"])
    return float((lost - left) / lost)


def expert_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each expert the domains it was built from, and those whose tokens it gets."""
    share: Mapping[str, Sequence[float]] = results["routing"].get("share", {})
    if not share:
        return []
    experts = len(next(iter(share.values())))
    groups = results["groups"]
    rows = []
    for number in range(experts):
        served = sorted(share, key=lambda domain: -share[domain][number])
        first = [domain for domain in served if max(share[domain]) == share[domain][number]]
        rows.append(
            {
                "number": number,
                "built_from": groups[number] if has_own_groups(results) else [],
                "first_choice_of": first,
                "served": [(domain, share[domain][number]) for domain in served[:3]],
                "load": float(np.mean([values[number] for values in share.values()])),
            }
        )
    return rows


def has_own_groups(results: Mapping[str, Any]) -> bool:
    """Whether each expert began with a group of domains of its own."""
    share = results["routing"].get("share", {})
    experts = len(next(iter(share.values()), []))
    return experts > 1 and len(results["groups"]) == experts


def own_share(results: Mapping[str, Any]) -> float | None:
    """Share of a domain's assignments that its own expert gets, mean over domains; none where groups are not experts."""
    share = results["routing"].get("share", {})
    if not has_own_groups(results):
        return None
    own = [
        share[domain][number] for number, group in enumerate(results["groups"]) for domain in group if domain in share
    ]
    return float(np.mean(own)) if own else None


def domain_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Perplexity of every domain at every stage, at the length of the headline."""
    length = headline_length(results)
    expert = {domain: number for number, group in enumerate(results["groups"]) for domain in group}
    return [
        {
            "domain": domain,
            "expert": expert.get(domain),
            "perplexity": [stage["perplexity"].get(f"{domain}@{length}") for stage in results["stages"]],
        }
        for domain in results["evaluation"]["domains"]
    ]


def headline_length(results: Mapping[str, Any]) -> int:
    """Tokens of the windows that the headline mean is taken at."""
    return int(results["run"]["config"]["eval"]["lengths"][0])


def task_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores of evaluation tasks, where they were measured: a row a task and metric, (value, standard error) a stage."""
    scores = [stage.get("tasks", {}) for stage in results["stages"]]
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


def contaminated_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Texts that were measured and stand in part in the training text, the largest share of documents first."""
    found = results.get("contamination", {})
    rows = [
        {"kind": kind.removesuffix("s"), "name": name, **overlap}
        for kind in ("domains", "sets", "tasks")
        for name, overlap in found.get(kind, {}).items()
        if overlap["found"]
    ]
    return sorted(rows, key=lambda row: -row["share"])


def plan_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was planned of each stage and of the whole run beside what it took: (planned, actual) seconds and bytes."""
    if "plan" not in results:
        return []
    planned, actual = results["plan"]["planned"], results["plan"]["actual"]
    disk = planned["disk_bytes"]
    whole = {**planned, "name": "whole run", "disk_bytes": disk["store"] + disk["export"]}
    took = {stage["name"]: stage for stage in actual["stages"]} | {"whole run": actual}
    figures = ("seconds", "host_bytes", "device_bytes", "disk_bytes")
    return [
        {
            "name": stage["name"],
            "flops": stage.get("flops"),
            "reused": took.get(stage["name"], {}).get("reused", False),
            **{figure: (stage[figure], took.get(stage["name"], {}).get(figure)) for figure in figures},
        }
        for stage in [*planned["stages"], whole]
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# -------------------------------------------------------------------------------------------------------------- figures


def figures(results: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page draws."""
    return {
        "groups": results["groups"],
        "stages": [{"name": s["name"], "label": s["label"]} for s in stage_rows(results)],
        "domains": domain_rows(results),
        "affinity": affinity_figure(results),
        "overlap": results.get("overlap"),
        "routing": results["routing"].get("share_by_layer"),
        "curves": curves,
    }


def affinity_figure(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Affinities (n, n), the cross-domain perplexities they come from if they do, and the tree; none if nothing was mined."""
    mined = results.get("affinity")
    if mined is None:
        return None
    domains = mined["domains"]
    figure = {"domains": domains, "perplexity": mined.get("perplexity"), "tree": None}
    by_perplexity = figure["perplexity"] is not None
    figure["affinity"] = affinity(figure["perplexity"]).tolist() if by_perplexity else mined["similarity"]
    group = {domain: number for number, members in enumerate(results["groups"]) for domain in members}
    if "tree" not in mined:
        figure["order"] = sorted(range(len(domains)), key=lambda i: group.get(domains[i], len(domains)))
        return figure
    tree = np.array(mined["tree"])
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
