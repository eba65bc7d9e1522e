"""Results as text: the tables that end a run, and the model card."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from dive.eval.tasks import headline
from dive.results import AskedTask, Results, StageResult
from dive.units import clock, count


def model_name(settings: Mapping[str, Any]) -> str:
    """What people call the dense model: its name on the hub, or that of its directory or file; the embedded one's own."""
    name, path = str(settings["model.name"]), Path(str(settings["model.path"]))
    if str(path) == "embedded":
        return name
    if path.parent.name == "snapshots":  # of the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return path.parents[1].name.rpartition("--")[2] or name
    return (path.stem if path.suffix == ".gguf" else path.name) or name


def results_table(results: Results) -> Table:
    """Perplexity, tokens and time of every stage."""
    named = results.evaluation.sets
    table = Table(title="Perplexity (geometric mean over the domains' test texts; lower is better)")
    table.add_column("stage")
    for name in ("mean", *named, "trained", "tokens", "time"):
        table.add_column(name, justify="right")
    for stage in results.stages:
        table.add_row(
            stage.name,
            *(f"{stage.perplexity[key]:.2f}" for key in ("mean", *named)),
            count(stage.trained) if stage.trained else "–",
            (count(stage.tokens) if stage.tokens else "–") + (" calibration" if stage.calibration else ""),
            clock(stage.seconds) + (" (reused)" if stage.reused else ""),
        )
    return table


def _tokens(stage: StageResult) -> str:
    return f"{stage.tokens:,} (calibration)" if stage.calibration else f"{stage.tokens:,}"


def task_tables(results: Results) -> list[Table]:
    """The chosen or first metric of every task, a column a stage, in percent; no table without tasks."""
    measured = [(stage, stage.tasks) for stage in results.stages if stage.tasks is not None]
    if not measured:
        return []
    table = Table(title="Tasks (± standard error)")
    table.add_column("task")
    for name in ("shots", "questions"):
        table.add_column(name, justify="right")
    table.add_column("metric")
    for stage, _ in measured:
        table.add_column(stage.name, justify="right")
    for task, metrics in measured[0][1].items():
        if not metrics:
            continue
        asked = asked_with(results.evaluation.tasks, task)
        metric, _ = headline(metrics, None if asked is None else asked.metric)
        table.add_row(
            task,
            "–" if asked is None or asked.shots is None else str(asked.shots),
            f"{asked.questions:,}" if asked is not None and task not in asked.members else "–",
            metric,
            *(_percent(tasks[task], metric) for _, tasks in measured),
        )
    table.add_section()
    table.add_row("mean", "", "", "", *(f"{stage.tasks_mean:.2%}" for stage, _ in measured))
    return [table]


def asked_with(tasks: Mapping[str, AskedTask], task: str) -> AskedTask | None:
    """How a task was put: by its own name, or as a member of a group that was asked for."""
    return tasks.get(task) or next((asked for asked in tasks.values() if task in asked.members), None)


def _percent(metrics: Mapping[str, float], metric: str) -> str:
    name, comma, behind = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{behind}")
    return f"{metrics[metric]:.2%}" + (f" ± {error:.2%}" if error is not None else "")


def perplexity_table(results: Results) -> Table:
    """Perplexity on every text, a column a stage."""
    table = Table(title="Perplexity")
    table.add_column("text")
    for stage in results.stages:
        table.add_column(stage.name, justify="right")
    for key in results.stages[0].perplexity:
        table.add_row(key, *(f"{stage.perplexity[key]:.2f}" for stage in results.stages))
    return table


def _domains_of_experts(results: Results) -> list[str]:
    """Section of the card: the groups that experts began with, or else the three domains that use each of them most."""
    if results.groups:
        listed = [
            f"- expert {number}: {', '.join(map(markdown, group))}" for number, group in enumerate(results.groups)
        ]
        return ["## Domains of each expert", "", *listed, ""]
    share = results.share
    listed = []
    for number in range(len(next(iter(share.values()), []))):
        most = sorted(share, key=lambda domain: -share[domain][number])[:3]
        listed.append(
            f"- expert {number}: {', '.join(f'{markdown(domain)} {share[domain][number]:.0%}' for domain in most)}"
        )
    return ["## Share of a domain's tokens that each expert gets, the largest three", "", *listed, ""] if listed else []


def lost(precision: str) -> str:
    """What is said of a model that came from a GGUF file."""
    return f"The dense model was de-quantised from a GGUF file ({precision}): what its weights had beyond that is lost."


def model_card(results: Results, notes: Sequence[str] = ()) -> str:
    """README.md of an export: what it is, the domains of each expert, results, configuration.

    Args:
        notes: on engines that do not serve it.
    """
    config, settings, counts = results.run.config, results.settings, results.parameters
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [mixture-of-experts, pruning, dive]",
    ]
    base = str(settings["model.path"])
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", base):  # a name on the hub, and no path
        front.append(f"base_model: {json.dumps(base)}")
    sizes = (counts.dense, counts.total, counts.active, counts.trained)
    lines = [
        *front,
        "---",
        "",
        f"# Mixture-of-Experts from {markdown(model_name(settings))}",
        "",
        f"{settings['moe.experts']} experts, {settings['moe.top_k']} active per token; each is the dense model's FFN with "
        f"{settings['pruning.ratio']:.0%} of its channels pruned. Made by pruning and reconstruction after DIVE "
        "(ACL 2025, arXiv 2506.09351)." + _beside_experts(settings),
        *([] if not notes else ["", "> **Not in every engine.** " + " ".join(notes)]),
        *([] if results.run.precision is None else ["", lost(results.run.precision)]),
        "",
        "| parameters | dense | total | active | trained |",
        "| --- | --- | --- | --- | --- |",
        "| | " + " | ".join("–" if size is None else count(size) for size in sizes) + " |",
        "",
        *_domains_of_experts(results),
        "## Perplexity",
        "",
        "Geometric mean over the domains' test texts, non-overlapping windows.",
        "",
        "| stage | perplexity | retraining tokens |",
        "| --- | --- | --- |",
        *(f"| {markdown(s.name)} | {s.mean:.2f} | {_tokens(s)} |" for s in results.stages),
        "",
        "## Configuration",
        "",
        *fenced_json(config),
        "",
    ]
    return "\n".join(lines)


def _beside_experts(settings: Mapping[str, Any]) -> str:
    """What a token meets beside its experts; settings of older runs lack these."""
    found = ""
    if settings.get("moe.shared_expert") and settings["moe.experts"] > 1:
        found += (
            f" {settings['moe.shared_expert']:.0%} of what is left of it is one shared expert, which every token meets."
        )
    if settings.get("moe.dense_layers"):
        layers = ", ".join(map(str, settings["moe.dense_layers"]))
        found += f" Layers {layers} stay dense, numbered from 0."
    return found


def markdown(text: str) -> str:
    """Text that comes from data as Markdown shows it: no markup, no link, no HTML, on one line."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"[\\`*\[\]|#~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", plain)


def fenced_json(value: Any) -> list[str]:
    """Lines of a block of JSON, in a fence that nothing inside it closes; ``<`` and its like are written as JSON's escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    for character in "<>&":  # they stand in strings alone
        text = text.replace(character, f"\\u{ord(character):04x}")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}json", text, fence]
