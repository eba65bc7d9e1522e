"""What W&B is given, read back from the file of an offline run."""

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dive.cli import PACKAGE
from dive.logger.keys import WHOLE_RUN
from dive.logger.tables import tables
from dive.logger.unfinished import note_of
from dive.logger.wandb_run import NAME, log_results, run_id
from dive.results import from_json
from dive.store import plain
from tests.report import made
from tests.workplace import Workplace, write_task


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: 7 bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    position, pending = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left  # padding at the end of a block
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)  # after the checksum
        pending += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield pending
            pending = b""


@dataclass
class Offline:
    """What one offline run recorded, the last value of each key."""

    directory: Path
    id: str = ""
    group: str = ""
    settings: set[str] = field(default_factory=set)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)

    @property
    def logged(self) -> set[str]:
        return {key for row in self.history for key in row}

    def table(self, key: str) -> dict[str, Any]:
        """A logged table: columns and data."""
        (entry,) = [row[key] for row in self.history if key in row]
        assert entry["_type"] == "table-file"
        found: dict[str, Any] = json.loads((self.directory / "files" / entry["path"]).read_text())
        return found


def values(items: Any) -> dict[str, Any]:
    """{key: value} of a record; parts of a dictionary come one by one."""
    found: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inner = found
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return found


def read(directory: Path) -> Offline:
    from wandb.proto import wandb_internal_pb2

    (file,) = directory.glob("*.wandb")
    found = Offline(directory)
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.run.run_id:
            found.id, found.group = record.run.run_id, record.run.run_group
        if record.history.item:
            found.history.append(values(record.history.item))
        found.summary |= values(record.summary.update)
        found.settings |= {item.key for item in (*record.config.update, *record.run.config.update)}
        if record.metric.glob_name:
            found.axes[record.metric.glob_name] = record.metric.step_metric
        if record.artifact.name:
            found.artifacts[record.artifact.name] = record.artifact
        if record.request.log_artifact.artifact.name:
            found.artifacts[record.request.log_artifact.artifact.name] = record.request.log_artifact.artifact
    return found


@pytest.fixture(scope="module")
def results(workplace: Workplace) -> dict[str, Any]:
    pytest.importorskip("lm_eval")
    root = write_task(workplace.root / "tasks", "felines")
    logged = ("logger=[csv,tensorboard,wandb]", f"eval.task_path={root}", "eval.tasks=[felines]")
    return workplace.run("logged", *logged)


@pytest.fixture(scope="module")
def offline(results: dict[str, Any], workplace: Workplace) -> Offline:
    (directory,) = (workplace.root / "logged").glob("wandb/offline-run-*")
    return read(directory)


def test_curves_and_configuration(offline: Offline) -> None:
    assert {
        "retrain/loss",
        "retrain/perplexity",
        "retrain/tokens_per_second",
        "retrain/learning_rate",
    } <= offline.logged
    assert {"retrain/router_entropy/layer_01", "retrain/expert_load/layer_00/expert_1"} <= offline.logged
    assert {"moe", "pruning", "retrain"} <= offline.settings
    assert {"dense/eval_perplexity/mean", "retrain/eval_perplexity/cats/32"} <= offline.logged


def test_curves_are_drawn_over_tokens(offline: Offline) -> None:
    assert offline.axes == {"router/*": "router/tokens", "retrain/*": "retrain/tokens"}
    assert all("retrain/tokens" in row for row in offline.history if "retrain/loss" in row)


def test_tables_hold_what_results_hold(offline: Offline, results: dict[str, Any]) -> None:
    stages = offline.table("results/stages")
    assert stages["columns"][:2] == ["stage", "perplexity"]
    assert [row[1] for row in stages["data"]] == pytest.approx([s["perplexity"]["mean"] for s in results["stages"]])
    groups = offline.table("affinity/groups")
    assert [row[1].split(", ") for row in groups["data"]] == results["groups"]
    matrix = offline.table("affinity/perplexity")
    assert [row[1:] for row in matrix["data"]] == results["affinity"]["perplexity"]
    share = offline.table("routing/share")
    assert len(share["data"]) == 4 * 2 * 2  # domains, layers, experts
    by_text = offline.table("results/perplexity")
    names = [stage["name"] for stage in results["stages"]]
    assert by_text["columns"] == ["text", *names]
    tasks = offline.table("results/tasks")
    assert tasks["columns"] == ["task", "metric", *names]
    scores = {(row[0], row[1]): row[2:] for row in tasks["data"]}
    assert scores["felines", "acc"] == [stage["tasks"]["felines"]["acc"] for stage in results["stages"]]
    assert dict(offline.table("results/parameters")["data"]) == results["parameters"]
    load = offline.table("routing/load")
    assert [row[1] for row in load["data"]] == results["routing"]["load_max_over_mean"]
    *by_stage, whole = offline.table("results/cost")["data"]
    plan = results["plan"]
    assert whole[:3] == ["whole run", plan["planned"]["seconds"], plan["actual"]["seconds"]]
    assert {row[0]: row[1] for row in by_stage} == {s["name"]: s["seconds"] for s in plan["planned"]["stages"]}
    took = {stage["name"]: stage["seconds"] for stage in plan["actual"]["stages"]}
    assert [row[2] for row in by_stage] == [took.get(row[0]) for row in by_stage]


def test_every_key_is_a_stage_and_a_metric(offline: Offline, results: dict[str, Any], workplace: Workplace) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    stages = [stage["name"] for stage in results["stages"]]
    pattern = re.compile(rf"({'|'.join([*stages, *WHOLE_RUN])})/[a-z_]+(/.+)?")
    rich = {key for row in offline.history for key, value in row.items() if isinstance(value, dict)}
    assert {key.partition("/")[0] for key in rich} == {"results", "affinity", "routing", "figures"}
    logged = {key for key in offline.logged - rich if not key.startswith("_")}  # W&B's own: _step, _runtime, _timestamp
    boards: set[str] = set()
    for folder in (*stages[3:], "results"):
        board = event_accumulator.EventAccumulator(str(workplace.root / "logged/tensorboard" / folder))
        boards |= set(board.Reload().Tags()["scalars"])
    curves = {
        key
        for stage in stages[3:]
        for key in (workplace.root / f"logged/csv/{stage}/metrics.csv").read_text().splitlines()[0].split(",")
    }
    assert curves - {"step"} <= logged  # the first column of the files
    assert "retrain/eval_score/felines/acc" in logged
    assert not {key for key in logged if pattern.fullmatch(key) is None}
    assert boards == logged


def test_the_page_has_every_key(offline: Offline) -> None:
    page = (PACKAGE.parent / "docs/tracking.md").read_text(encoding="utf-8")
    first = re.findall(r"^\| (`[^|]*`) \|", page.partition("## Keys")[2].partition("\n## ")[0], re.MULTILINE)
    names = [name for cell in first for name in re.findall(r"`([^`]*)`", cell)]
    assert len(names) > 25
    patterns = [re.compile(re.sub(r"<\w+>", ".+", re.escape(name))) for name in names]
    logged = {key for key in offline.logged if not key.startswith("_")}
    assert not {key for key in logged if not any(pattern.fullmatch(key) for pattern in patterns)}
    absent = {name for name, pattern in zip(names, patterns, strict=True) if not any(map(pattern.fullmatch, logged))}
    assert absent == {"affinity/mapped", "affinity/similarity"}  # of runs that map the affinity of their domains


def test_the_dashboard_shows_what_the_run_logged(
    offline: Offline, results: dict[str, Any], workplace: Workplace
) -> None:
    pytest.importorskip("wandb_workspaces")
    from dive.logger.dashboard import TABLES, workspace

    stages = [stage["name"] for stage in results["stages"]]
    made = workspace(
        "me", "dive", name="DIVE", measured=stages, retrained=stages[3:], tables=tables(from_json(results))
    )
    document = json.loads(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    panels = [p for s in document["section"]["panelBankConfig"]["sections"] for p in s["panels"]]
    named: set[str] = set()
    for config in (panel["config"] for panel in panels):
        named |= {*config.get("metrics", []), *config.get("mediaKeys", [])}
        named |= {config[axis].removeprefix("summary:") for axis in ("xAxis", "yAxis") if axis in config}
        if "metricRegex" in config:
            assert any(re.fullmatch(config["metricRegex"], key) for key in offline.logged)
    shown = {p.table_name for s in made.sections for p in s.panels if type(p).__name__ == "WeavePanelSummaryTable"}
    assert shown == {name for name in offline.logged if name.partition("/")[0] in ("results", "affinity", "routing")}
    assert len(named) > 20
    assert named <= offline.logged
    # A run of the defaults maps the affinity of its domains, where this one mines groups by it.
    assert set(TABLES) - shown == {"affinity/mapped", "affinity/similarity"}


def test_images_are_the_figures(offline: Offline) -> None:
    for name in ("affinity", "routing"):
        (image,) = [row[f"figures/{name}"] for row in offline.history if f"figures/{name}" in row]
        assert (offline.directory / "files" / image["path"]).read_bytes().startswith(b"\x89PNG")


def test_summary_has_what_compares_runs_and_the_tables(
    results: dict[str, Any], workplace: Workplace, tmp_path: Path
) -> None:
    import wandb

    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(quiet=True)) as run:
        log_results(run, from_json(results), workplace.root / "logged")
        summary = dict(run.summary)
    perplexities = [stage["perplexity"]["mean"] for stage in results["stages"]]
    assert summary["final/stage"] == "retrain"
    assert summary["final/perplexity"] == pytest.approx(perplexities[-1])
    assert summary["final/perplexity_over_dense"] == pytest.approx(perplexities[-1] / perplexities[0])
    assert summary["parameters/active"] == results["parameters"]["active"]
    assert summary["final/tokens"] == sum(stage["tokens"] for stage in results["stages"])
    assert summary["final/seconds"] == pytest.approx(results["timings"]["total"])
    assert summary["retrain/seconds"] == pytest.approx(results["timings"]["retrain"])
    assert summary["cost/planned_seconds"] == pytest.approx(results["plan"]["planned"]["seconds"])
    assert summary["cost/actual_seconds"] == pytest.approx(results["plan"]["actual"]["seconds"])
    shown = {key for key, value in summary.items() if hasattr(value, "get") and value.get("_type") == "table-file"}
    assert shown == set(tables(from_json(results)))
    assert shown >= {"results/tasks", "results/parameters", "results/cost", "routing/load"}


def test_artifacts_name_what_they_came_from(offline: Offline, results: dict[str, Any]) -> None:
    assert {a.type for a in offline.artifacts.values()} >= {"groups", "model"}
    groups, (export,) = offline.artifacts["groups"], [a for n, a in offline.artifacts.items() if n.startswith("moe-")]
    origin = json.loads(export.metadata)
    assert origin["dense_model"] == results["run"]["fingerprints"]["model"]
    assert origin["groups"] == groups.digest
    assert {entry.path for entry in export.manifest.contents} >= {"config.json", "model.safetensors"}
    assert all(entry.ref.startswith("file://") for entry in export.manifest.contents)  # weights stay where they are


def test_an_interrupted_run_goes_on_under_its_id(workplace: Workplace, results: dict[str, Any], tmp_path: Path) -> None:
    settings = plain(workplace.compose("logger=wandb"))
    first = run_id(settings, tmp_path)
    assert run_id(settings, tmp_path) == first
    assert run_id(settings | {"seed": 99}, tmp_path) != first
    note_of(NAME, settings, tmp_path).write_text("{broken")
    assert run_id(settings, tmp_path) != first
    # The run above ended, so that another of the same configuration would be another run.
    assert not list((workplace.root / "store/wandb").iterdir())


def test_layers_have_their_own_numbers() -> None:
    shares = {"law": [[0.75, 0.25]]}
    for layers, number in (([1], 1), (None, 0)):  # older runs did not record them
        routing = {"share": {"law": [0.75, 0.25]}, "share_by_layer": shares, "layers": layers}
        _, rows = tables(made.results(groups=[], parameters={}, routing=routing))["routing/share"]
        assert rows == [["law", number, 0, 0.75], ["law", number, 1, 0.25]]
