"""``results.json``: the layout that readers count on, and what is read back from it."""

import json
from pathlib import Path
from typing import Any

import pytest

from dive.errors import UserError
from dive.results import from_json, read_results, to_json, write_results
from tests.report.made import results, stage
from tests.workplace import WORDS, Workplace

STAGE = {"name", "calibration", "tokens", "seconds", "reused", "trained", "perplexity"}
SPENT = {"name", "seconds", "reused", "host_bytes", "device_bytes", "disk_bytes"}
LAYOUT: dict[str, set[str]] = {
    "": {
        *("run", "evaluation", "contamination", "groups", "parameters", "stages", "routing", "timings"),
        *("affinity", "overlap", "generations", "export", "plan"),
    },
    "run": {"command", "seed", "device", "versions", "fingerprints", "samples", "config", "artifacts"},
    "run.fingerprints": {"model", "domains", "retraining_corpus"},
    "run.fingerprints.domains.cats": {"train", "test"},
    "run.samples": {"calibration", "evaluation"},
    "evaluation": {"domains", "sets", "tasks"},
    "contamination": {"ngram", "domains", "sets", "tasks"},
    "contamination.domains.cats": {
        *("documents", "long_enough", "found", "share", "ngrams", "ngrams_found", "ngram_share", "sources", "cut")
    },
    "parameters": {"dense", "pruned", "total", "active", "trained"},
    "stages.0": STAGE,
    "stages.4": STAGE,
    "routing": {"share", "share_by_layer", "layers", "load_max_over_mean", "load_entropy", "tokens", "texts"},
    "routing.texts.0": {"domain", "ids", "experts", "tokens"},
    "timings": {"dense", "pruned", "reconstructed", "router", "retrain", "total"},
    "affinity": {
        "groups",
        "routing",
        "tree",
        "cophenetic",
        "silhouette",
        "domains",
        "perplexity",
        "measure",
        "agreement",
        "seconds",
    },
    "generations.0": {"domain", "prompt", "reference", "dense", "moe"},
    "plan": {"planned", "actual"},
    "plan.planned": {
        *("device", "cores", "utilisation", "parameters"),
        *("host_bytes", "device_bytes", "disk_bytes", "seconds", "stages"),
    },
    "plan.planned.disk_bytes": {"store", "export", "checkpoints"},
    "plan.planned.stages.0": {"name", "tokens", "flops", "host_bytes", "device_bytes", "disk_bytes", "seconds"},
    "plan.actual": {"host_bytes", "device_bytes", "disk_bytes", "seconds", "stages"},
    "plan.actual.stages.0": SPENT,
}


def at(tree: Any, path: str) -> Any:
    for key in filter(None, path.split(".")):
        tree = tree[int(key) if isinstance(tree, list) else key]
    return tree


@pytest.fixture(scope="module")
def finished(workplace: Workplace) -> Path:
    """Directory of a finished run."""
    workplace.run("recorded")
    return workplace.root / "recorded"


def test_the_layout_of_the_file_is_what_it_was(finished: Path) -> None:
    written = json.loads((finished / "results.json").read_text())
    assert {path: set(at(written, path)) for path in LAYOUT} == LAYOUT


def test_what_is_written_is_read_back(finished: Path, tmp_path: Path) -> None:
    found = read_results(finished)
    write_results(found, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads((finished / "results.json").read_text())
    assert found == read_results(tmp_path)
    assert [s.name for s in found.stages] == ["dense", "pruned", "reconstructed", "router", "retrain"]
    assert set(found.share) == set(WORDS)


def test_stages_are_asked_for_by_name() -> None:
    late = results(stages=[stage("pruned", 3.0), stage("dense", 2.0), stage("more", 2.5, tokens=7, trained=1)])
    assert late.dense is late.stages[1]
    assert late.pruned is late.stages[0]
    assert late.stage("retrain") is None
    assert late.tokens == 7
    assert [s.label for s in late.stages] == ["pruned, one expert", "dense model", "after stage more"]
    assert results().dense is None


def test_sizes_of_a_stage_are_its_models() -> None:
    counts = {"dense": 10, "pruned": 5, "total": 30, "active": 6}
    made = results(parameters=counts, stages=[stage(name, 1.0) for name in ("dense", "pruned", "more")])
    assert [made.size_of(s) for s in made.stages] == [(10, 10), (5, 5), (6, 30)]
    older = results(parameters={"dense": 10}, stages=[stage("pruned", 1.0)])
    assert older.size_of(older.stages[0]) == (None, None)


def test_nothing_that_is_missing_is_written() -> None:
    written = to_json(results())
    assert set(written) == {"run", "evaluation", "contamination", "parameters", "stages", "timings"}
    assert written["contamination"] == written["parameters"] == {}
    asked = {"shots": None, "limit": 40, "metric": None, "questions": 40, "members": []}
    tasks = {"domains": [], "sets": [], "tasks": {"piqa": asked}}
    assert to_json(results(evaluation=tasks))["evaluation"] == tasks  # null says that the task's own number stands


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"run": []}, "run is list"),
        ({"evaluation": {"sets": []}}, "evaluation has no domains"),
        ({"stages": [{"name": "x"}]}, "stages has no tokens"),
        ({"stages": [stage("x", 1.0, seconds="long")]}, "seconds is str"),
        ({"parameters": {"dense": "many"}}, "dense is str"),
        ({"timings": 3}, "timings is int"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(to_json(results()) | change))
    with pytest.raises(UserError) as refused:
        read_results(tmp_path)
    assert str(refused.value) == f"{tmp_path / 'results.json'}: not the results of a run ({said})"


def test_what_a_later_version_adds_is_left_alone() -> None:
    assert from_json(to_json(results()) | {"luck": 7}) == results()


def test_settings_are_named_as_on_the_command_line() -> None:
    made = results({"moe": {"experts": 8}, "eval": {"lengths": [256]}})
    assert (made.settings["moe.experts"], made.settings["eval.lengths"]) == (8, [256])
