"""The workspace, against wandb-workspaces' own object model."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workplace import environment

pytest.importorskip("wandb_workspaces")


def test_every_panel_shows_what_runs_log(tmp_path: Path) -> None:
    from dive.logger.dashboard import workspace

    made = workspace("someone", "dive", name="DIVE", stages=["router", "experts"])
    assert [section.name for section in made.sections] == [
        *("Results", "Affinity and routing", "Retraining", "Experts", "Cost")
    ]
    assert all(section.panels for section in made.sections)
    lines = [p for section in made.sections for p in section.panels if type(p).__name__ == "LinePlot"]
    assert {line.x.name if hasattr(line.x, "name") else line.x for line in lines} == {"router/tokens", "experts/tokens"}
    patterns = [line.metric_regex for line in lines if line.metric_regex]
    assert any(re.fullmatch(p, "experts/router_entropy/layer_01") for p in patterns)
    assert any(re.fullmatch(p, "experts/expert_load/layer_00/expert_1") for p in patterns)
    document: dict[str, Any] = made._to_model().model_dump()  # what would be sent
    assert "final/perplexity" in str(document)


def test_a_dry_run_lists_sections_and_saves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dive.dashboard", "entity=someone"]
    done = subprocess.run(
        [*command, "dry_run=true"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Retraining: 3 panels" in done.stdout
    environ = {k: v for k, v in environment().items() if k != "WANDB_API_KEY"} | {"HOME": str(tmp_path)}
    refused = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1
    assert "wandb login" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
