"""The workspace, against wandb-workspaces' own object model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dive.results import write_results
from tests.report.made import results, stage
from tests.workplace import environment

pytest.importorskip("wandb_workspaces")


def test_every_panel_shows_what_runs_log(tmp_path: Path) -> None:
    from dive.logger.dashboard import workspace

    made = workspace(
        "someone",
        "dive",
        name="DIVE",
        measured=["dense", "extra", "router", "retrain"],
        retrained=["router", "retrain"],
    )
    assert [section.name for section in made.sections] == [
        *("Results", "Affinity and routing", "Retraining", "Experts", "Cost")
    ]
    assert all(section.panels for section in made.sections)
    lines = [p for section in made.sections for p in section.panels if type(p).__name__ == "LinePlot"]
    assert {line.x.name if hasattr(line.x, "name") else line.x for line in lines} == {"router/tokens", "retrain/tokens"}
    patterns = [line.metric_regex for line in lines if line.metric_regex]
    assert any(re.fullmatch(p, "retrain/router_entropy/layer_01") for p in patterns)
    assert any(re.fullmatch(p, "retrain/expert_load/layer_00/expert_1") for p in patterns)
    bars = {p.title: p.metrics for section in made.sections for p in section.panels if type(p).__name__ == "BarPlot"}
    names = ["dense", "extra", "router", "retrain"]
    assert bars["Perplexity after each stage"] == [f"{name}/eval_perplexity/mean" for name in names]
    assert bars["Seconds"] == [f"{name}/seconds" for name in (*names, "final")]


def test_what_is_sent_is_what_the_library_reads_back() -> None:
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.workspaces.internal import View, WorkspaceViewspec

    from dive.logger.dashboard import workspace

    stages = ["dense", "pruned", "reconstructed", "retrain"]
    made = workspace("someone", "dive", name="DIVE", measured=stages, retrained=["retrain"])
    view: View = made._to_model()
    sent = view.spec.model_dump_json(by_alias=True, exclude_none=True)  # as save() sends it
    received = WorkspaceViewspec.model_validate_json(sent)
    assert received == view.spec
    back = ws.Workspace._from_model(view.model_copy(update={"spec": received}))
    assert (back.entity, back.project, back.name) == ("someone", "dive", "DIVE")
    assert [section.name for section in back.sections] == [section.name for section in made.sections]
    panels, again = ([p for section in w.sections for p in section.panels] for w in (made, back))
    assert [type(panel) for panel in again] == [type(panel) for panel in panels]
    assert "UnknownPanel" not in {type(panel).__name__ for panel in again}
    assert [p._to_model().config for p in again] == [p._to_model().config for p in panels]


def test_a_dry_run_lists_sections_and_saves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dive.dashboard", "entity=someone"]
    done = subprocess.run(
        [*command, "dry_run=true"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Retraining: 3 panels" in done.stdout
    write_results(
        results(stages=[stage("dense", 2.0), stage("one", 1.0, tokens=8), stage("two", 1.0, tokens=8)]), tmp_path
    )
    like_a_run = subprocess.run(
        [*command, "dry_run=true", f"results={tmp_path}"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Retraining: 6 panels" in like_a_run.stdout
    (tmp_path / "results.json").unlink()
    environ = {k: v for k, v in environment().items() if k != "WANDB_API_KEY"} | {"HOME": str(tmp_path)}
    refused = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1
    assert "wandb login" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
