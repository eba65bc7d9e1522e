"""What W&B is given, read back from the file of an offline run."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dive.logger.wandb_run import run_id, run_id_file, tables
from dive.store import plain
from tests.report import made
from tests.workplace import Workplace


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
    return workplace.run("logged", "logger=[csv,wandb]")


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
    assert {"eval/dense/mean", "eval/retrain/cats@32"} <= set(offline.summary)


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
    assert by_text["columns"] == ["text", *(stage["name"] for stage in results["stages"])]


def test_images_are_the_figures(offline: Offline) -> None:
    for name in ("affinity", "routing"):
        (image,) = [row[f"figures/{name}"] for row in offline.history if f"figures/{name}" in row]
        assert (offline.directory / "files" / image["path"]).read_bytes().startswith(b"\x89PNG")


def test_summary_compares_runs(offline: Offline, results: dict[str, Any]) -> None:
    perplexities = [stage["perplexity"]["mean"] for stage in results["stages"]]
    assert offline.summary["final/perplexity"] == pytest.approx(perplexities[-1])
    assert offline.summary["final/perplexity_over_dense"] == pytest.approx(perplexities[-1] / perplexities[0])
    assert offline.summary["parameters/active"] == results["parameters"]["active"]
    assert offline.summary["final/tokens"] == sum(stage["tokens"] for stage in results["stages"])


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
    run_id_file(settings, tmp_path).write_text("{broken")
    assert run_id(settings, tmp_path) != first
    # The run above ended, so that another of the same configuration would be another run.
    assert not run_id_file(plain(workplace.compose("logger=[csv,wandb]")), workplace.root / "store").exists()


def test_layers_have_their_own_numbers() -> None:
    shares = {"law": [[0.75, 0.25]]}
    for layers, number in (([1], 1), (None, 0)):  # older runs did not record them
        routing = {"share": {"law": [0.75, 0.25]}, "share_by_layer": shares, "layers": layers}
        _, rows = tables(made.results(groups=[], parameters={}, routing=routing))["routing/share"]
        assert rows == [["law", number, 0, 0.75], ["law", number, 1, 0.25]]
