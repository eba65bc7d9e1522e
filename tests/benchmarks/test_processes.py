"""Two processes build what one builds, and the table says how fast."""

import pytest

from benchmarks.processes import main
from tests.benchmarks.tables import read_table


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--shape", "tiny", "--layers", "1", "--tokens", "512", "--length", "32", "--processes", "1,2"]
    overrides = ["moe.experts=2", "pruning.ratio=0.5", "moe.refined.steps=4", "moe.distillation.steps=5"]
    assert main([*sizes, *overrides]) == 0
    rows = read_table(capsys.readouterr().out)
    assert [row["processes"] for row in rows] == ["1", "2"]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert [row["masks that differ"] for row in rows] == ["0", "0"]
    assert float(rows[1]["largest relative distance of a tensor"]) < 1e-3
