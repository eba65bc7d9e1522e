"""Results as text: the table that ends a run, and the model card."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dive.eval.tasks import headline


def count(number: float) -> str:
    """1234567 as 1.23 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def stage_table(results: Mapping[str, Any]) -> Table:
    """Perplexity, tokens and time of every stage."""
    named = results["evaluation"]["sets"]
    table = Table(title="Perplexity (geometric mean over the domains' test texts; lower is better)")
    table.add_column("stage")
    for name in ("mean", *named, "trained", "tokens", "time"):
        table.add_column(name, justify="right")
    for stage in results["stages"]:
        values = stage["perplexity"]
        table.add_row(
            stage["name"],
            *(f"{values[key]:.2f}" for key in ("mean", *named)),
            count(stage["trained"]) if stage["trained"] else "–",
            count(stage["tokens"]) if stage["tokens"] else "–",
            f"{stage['seconds']:.1f} s" + (" (reused)" if stage["reused"] else ""),
        )
    return table


def task_tables(results: Mapping[str, Any]) -> list[Table]:
    """The chosen or first metric of every task, a column a stage, in percent; no table without tasks."""
    described, stages = results["evaluation"]["tasks"], [s for s in results["stages"] if "tasks" in s]
    if not stages:
        return []
    table = Table(title="Tasks (± standard error)")
    table.add_column("task")
    table.add_column("examples", justify="right")
    table.add_column("metric")
    for stage in stages:
        table.add_column(stage["name"], justify="right")
    for task, metrics in stages[0]["tasks"].items():
        if not metrics:
            continue
        how = described.get(task, {})
        metric, _ = headline(metrics, how.get("metric"))
        table.add_row(
            task,
            "–" if how.get("shots") is None else str(how["shots"]),
            metric,
            *(_percent(stage["tasks"][task], metric) for stage in stages),
        )
    table.add_section()
    table.add_row("mean", "", "", *(f"{stage['tasks_mean']:.2%}" for stage in stages))
    return [table]


def _percent(metrics: Mapping[str, float], metric: str) -> str:
    name, comma, behind = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{behind}")
    return f"{metrics[metric]:.2%}" + (f" ± {error:.2%}" if error is not None else "")


def perplexity_table(results: Mapping[str, Any]) -> Table:
    """Perplexity on every text, a column a stage."""
    stages = results["stages"]
    table = Table(title="Perplexity")
    table.add_column("text")
    for stage in stages:
        table.add_column(stage["name"], justify="right")
    for key in stages[0]["perplexity"]:
        table.add_row(key, *(f"{stage['perplexity'][key]:.2f}" for stage in stages))
    return table


def trained_parameters_table(stage: str, rows: Sequence[tuple[str, int, int]]) -> Table:
    """What a stage trains, part by part."""
    table = Table(title=f"Stage {stage}: trained parameters")
    for name in ("part", "parameters", "trained", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    total, trained = sum(row[1] for row in rows), sum(row[2] for row in rows)
    for part, all_of_it, of_which in (*rows, ("all", total, trained)):
        share = of_which / all_of_it if all_of_it else 0.0
        table.add_row(part, f"{all_of_it:,}", f"{of_which:,}", f"{share:.2%}")
    return table


def show(*items: Any) -> None:
    """Print to the terminal; 120 columns where there is none."""
    console = Console(
        width=None if Console().is_terminal else 120, markup=False, emoji=False
    )  # names may have brackets
    for item in items:
        console.print(item, soft_wrap=isinstance(item, str))  # a line is the terminal's to wrap: paths stay whole


def _domains_of_experts(results: Mapping[str, Any]) -> list[str]:
    """Section of the card: the groups that experts began with, or else the three domains that use each of them most."""
    if results["groups"]:
        listed = [f"- expert {number}: {', '.join(group)}" for number, group in enumerate(results["groups"])]
        return ["## Domains of each expert", "", *listed, ""]
    shares: Mapping[str, Sequence[float]] = results["routing"].get("share", {})
    listed = []
    for number in range(len(next(iter(shares.values()), []))):
        most = sorted(shares, key=lambda domain: -shares[domain][number])[:3]
        listed.append(f"- expert {number}: {', '.join(f'{domain} {shares[domain][number]:.0%}' for domain in most)}")
    return ["## Share of a domain's tokens that each expert gets, the largest three", "", *listed, ""] if listed else []


def model_card(results: Mapping[str, Any], config: Mapping[str, Any], base: str) -> str:
    """README.md of an export: what it is, the domains of each expert, results, configuration."""
    parameters, moe, pruning = results["parameters"], config["moe"], config["pruning"]
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [mixture-of-experts, pruning, dive]",
    ]
    if "/" in base and not base.startswith(("/", ".", "~")):
        front.append(f"base_model: {json.dumps(base)}")
    lines = [
        *front,
        "---",
        "",
        f"# Mixture-of-Experts from {config['model']['name']}",
        "",
        f"{moe['experts']} experts, {moe['top_k']} active per token; each is the dense model's FFN with "
        f"{pruning['ratio']:.0%} of its channels pruned. Made by pruning and reconstruction after DIVE "
        "(ACL 2025, arXiv 2506.09351).",
        "",
        "| parameters | dense | total | active | trained |",
        "| --- | --- | --- | --- | --- |",
        "| | " + " | ".join(count(parameters[k]) for k in ("dense", "total", "active", "trained")) + " |",
        "",
        *_domains_of_experts(results),
        "## Perplexity",
        "",
        "Geometric mean over the domains' test texts, non-overlapping windows.",
        "",
        "| stage | perplexity | retraining tokens |",
        "| --- | --- | --- |",
        *(f"| {s['name']} | {s['perplexity']['mean']:.2f} | {s['tokens']:,} |" for s in results["stages"]),
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps(config, indent=2, ensure_ascii=False),
        "```",
        "",
    ]
    return "\n".join(lines)
