"""Results as text: the tables that end a run, and what of them goes into Markdown."""

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from dive.eval.tasks import headline
from dive.results import AskedTask, Results
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
