"""The page and table of many runs: ``sweep.html`` and ``sweep.csv``, from the runs' directories.

A job is a directory that Hydra or a run has written to. It is finished when ``results.json`` names an export, failed when
``failure.json`` says why, and otherwise not finished.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dive.errors import UserError
from dive.report.page import write_page
from dive.report.run import computing_seconds
from dive.results import FILE, LABELS, ParameterCounts, Results, flatten, read_results

FAILURE = "failure.json"
"""What :class:`dive.report.callback.SweepReport` leaves in the directory of a job that failed."""
PREFIXES = ("setting:", "stage:")
"""Of the columns that settings and stages are, whatever their names; the table leaves them out."""
CSV_NAMES = {"ratio": "pruning.ratio", "experts": "moe.experts", "top_k": "moe.top_k"}
"""What a column is called in the table, where that is the name of a setting."""
FEW = 4
"""Settings that a run is named by, at most."""
NOT_OF_THE_METHOD = ("store", "logger.", "trainer.devices", "trainer.num_nodes", "model.device")
"""Settings that do not tell one result from another."""


@dataclass(slots=True)
class SweptRun:
    """One run, finished or not."""

    directory: Path
    status: str
    """``finished``, ``failed`` or ``not finished``."""
    reason: str | None
    """One line, of a failed job."""
    config: dict[str, Any]
    """The composed configuration, flat: {"moe.experts": 8}."""
    results: Results | None


def is_job(directory: Path) -> bool:
    """Whether a run or Hydra has written to this directory."""
    return any((directory / name).exists() for name in (FILE, FAILURE, ".hydra/overrides.yaml"))


def find_jobs(directory: Path) -> list[Path]:
    """Directories of the jobs of a sweep, ordered by their numbers; of a run, itself.

    Raises:
        UserError: there is none.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    if is_job(directory):
        return [directory]
    found = [path for path in directory.iterdir() if path.is_dir() and is_job(path)]
    if not found:
        raise UserError(f"{directory}: neither a run (no results.json) nor a sweep (no run in it)")
    return sorted(found, key=lambda path: (int(path.name) if path.name.isdigit() else 1 << 30, path.name))


def read_job(directory: Path) -> SweptRun:
    """What a job's directory tells.

    Raises:
        UserError: its results are unreadable.
    """
    results = read_results(directory) if (directory / FILE).is_file() else None
    reason = None
    if (directory / FAILURE).is_file():
        reason = str(json.loads((directory / FAILURE).read_text(encoding="utf-8"))["reason"])
    status = "failed" if reason is not None else "finished" if results and results.export else "not finished"
    composed = directory / ".hydra/config.yaml"
    if results is not None:
        config = results.run.config
    else:
        config = yaml.safe_load(composed.read_text(encoding="utf-8")) if composed.is_file() else {}
    return SweptRun(directory, status, reason, flatten(config or {}), results)


def differing(jobs: Sequence[SweptRun]) -> list[str]:
    """Settings of the method that not all jobs share, in the order of the configuration."""
    known = [job for job in jobs if job.config]
    keys = dict.fromkeys(key for job in known for key in job.config if not key.startswith(NOT_OF_THE_METHOD))
    return [key for key in keys if len({json.dumps(job.config.get(key)) for job in known}) > 1]


def rows_of(jobs: Sequence[SweptRun], root: Path) -> list[dict[str, Any]]:
    """A row a job: where it is, what it was, what it reached and cost. ``None`` for what there is not."""
    keys = differing(jobs)
    texts = {text: None for job in jobs if (text := measured_on(job)) is not None}
    letters = {text: chr(ord("A") + number % 26) for number, text in enumerate(texts)}
    stages = untrained(jobs)
    return [_row(job, root, keys, stages, letters) for job in jobs]


def untrained(jobs: Sequence[SweptRun]) -> list[str]:
    """Names of the stages that nothing retrained, in the order of the runs: what a last stage is compared with."""
    stages = [stage for job in jobs if job.results is not None for stage in job.results.stages]
    return list(dict.fromkeys(stage.name for stage in stages if not stage.tokens))


def _row(
    job: SweptRun, root: Path, keys: Sequence[str], stages: Sequence[str], letters: Mapping[str, str]
) -> dict[str, Any]:
    results, text = job.results, measured_on(job)
    finished = results if job.status == "finished" else None
    reached = {stage.name: stage.mean for stage in results.stages} if results is not None else {}
    dense = results.dense if results is not None else None
    counts = results.parameters if results is not None else ParameterCounts()
    return {
        "run": os.path.relpath(job.directory, root),
        "status": job.status,
        "reason": job.reason,
        **{f"setting:{key}": job.config.get(key) for key in keys},
        "ratio": job.config.get("pruning.ratio"),
        "experts": job.config.get("moe.experts"),
        "top_k": job.config.get("moe.top_k"),
        "perplexity": finished.stages[-1].mean if finished and finished.stages else None,
        **{f"stage:{name}": reached.get(name) for name in stages},
        "active": counts.active,
        "total": counts.total,
        "dense_perplexity": None if dense is None else dense.mean,
        "dense_parameters": counts.dense,
        "tokens": finished.tokens if finished else None,
        "calibration_tokens": finished.calibration_tokens if finished else None,
        "seconds": computing_seconds(finished) if finished else None,
        "texts": letters[text] if text is not None else None,
    }


def measured_on(job: SweptRun) -> str | None:
    """What the headline perplexity was measured on: perplexities of different texts do not compare."""
    if job.results is None or not job.results.stages:
        return None
    prints, length = job.results.run.fingerprints, job.config["eval.lengths"][0]
    samples = job.results.run.samples.evaluation
    windows = {name: shape for name, shape in samples.items() if name.endswith(f"@{length}")}
    tests = {
        domain: prints.domains[domain].test for domain in job.results.evaluation.domains if domain in prints.domains
    }
    # Perplexity per token compares only where the tokens are the same: the model stands for its tokenizer.
    return json.dumps([prints.model, tests, windows], sort_keys=True)


def comparable(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices of the finished runs that were measured on the same texts: of the texts that most of them share."""
    finished = [i for i, row in enumerate(rows) if row["perplexity"] is not None and row["active"] is not None]
    common = Counter(rows[i]["texts"] for i in finished).most_common(1)
    return [i for i in finished if rows[i]["texts"] == common[0][0]]


def pareto(rows: Sequence[Mapping[str, Any]], among: Sequence[int]) -> list[int]:
    """Those of the runs ``among`` that none of them beats in perplexity and active parameters; by active parameters."""
    front: list[int] = []
    for i in sorted(among, key=lambda i: (rows[i]["active"], rows[i]["perplexity"])):
        if not front or rows[i]["perplexity"] < rows[front[-1]]["perplexity"]:
            front.append(i)
    return front


def write_sweep(directories: Sequence[Path], output: Path) -> Path:
    """Write ``sweep.csv`` and ``sweep.html`` about the jobs in these directories to ``output``.

    Returns:
        The page.
    """
    jobs = [read_job(directory) for directory in directories]
    rows = rows_of(jobs, output)
    settings = [key.removeprefix("setting:") for key in rows[0] if key.startswith("setting:")]
    stages = [key.removeprefix("stage:") for key in rows[0] if key.startswith("stage:")]
    write_csv(rows, output / "sweep.csv")
    same = comparable(rows)
    front = pareto(rows, same)
    best = min(same, key=lambda i: rows[i]["perplexity"], default=None)
    links = [(job.directory / "report.html").is_file() for job in jobs]
    return write_page(
        output / "sweep.html",
        "sweep.html",
        script="sweep.js",
        data={
            "rows": [{key: row[key] for key in row if not key.startswith(PREFIXES)} for row in rows],
            "names": [describe(row, settings) for row in rows],
            "front": front,
            "best": best,
            "comparable": same,
        },
        rows=rows,
        settings=settings,
        stages=[(f"stage:{name}", LABELS.get(name, name)) for name in reversed(stages)],
        few=len(settings) <= FEW,
        many=len({rows[i]["experts"] for i in same}) > 1,
        best=best,
        best_name=None if best is None else describe(rows[best], settings),
        front=set(front),
        links=links,
        failed=[row for row in rows if row["status"] == "failed"],
        unfinished=[row for row in rows if row["status"] == "not finished"],
        others=[i for i, row in enumerate(rows) if row["perplexity"] is not None and i not in same],
    )


def describe(row: Mapping[str, Any], settings: Sequence[str]) -> str:
    """A run by what sets it apart; by its directory where that is much."""
    parts = [f"{key}={setting(row[f'setting:{key}'])}" for key in settings]
    return " ".join(parts) if 0 < len(parts) <= FEW else str(row["run"])


def setting(value: Any) -> str:
    """A value of the configuration as one would write it on a command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list | dict) else str(value)


def write_csv(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """One line a job; empty cells for what there is not."""
    names = {key: CSV_NAMES.get(key, key.removeprefix("setting:").removeprefix("stage:")) for key in rows[0]}
    del names["dense_perplexity"]  # stands in the column of its stage
    names = {key: name for key, name in names.items() if key not in CSV_NAMES or f"setting:{name}" not in rows[0]}
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(names.values())
        writer.writerows([[cell(row[key]) for key in names] for row in rows])
    os.replace(temporary, file)


def cell(value: Any) -> Any:
    """A value for a csv file: lists and dictionaries as JSON."""
    return setting(value) if isinstance(value, bool | list | dict) else value
