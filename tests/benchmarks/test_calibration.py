"""Calibration is timed against two bare passes, on the same tokens."""

import pytest

from benchmarks.calibration import main
from tests.benchmarks.tables import read_table


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--domains", "3", "--samples", "4", "--length", "16", "--batch", "2", "--rounds", "2"]
    assert main(["--shape", "tiny", *sizes]) == 0
    printed = capsys.readouterr().out
    assert "3 domains × 4 × 16 tokens" in printed
    rows = read_table(printed)
    assert [row["pass"].partition(":")[0] for row in rows] == [
        "bare forward, decoder",
        "bare forward, decoder and head",
        *["calibration"] * 3,
    ]
    assert rows[0]["of the decoder's tokens/s"] == rows[1]["of the whole model's"] == "1.00"
    assert all(float(row["tokens/s"]) > 0 for row in rows)
