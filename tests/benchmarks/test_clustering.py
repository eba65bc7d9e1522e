"""Both sides divide the same things, and ours costs no more."""

import pytest

from benchmarks.clustering import main
from tests.benchmarks.tables import read_table


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rows", "600x16", "--channels", "200", "300", "--experts", "4", "--rounds", "1"]) == 0
    rows = read_table(capsys.readouterr().out)
    assert [row["what"] for row in rows] == [
        "k-means of 600 × 16",
        "division of 200 channels",
        "division of 300 channels",
    ]
    assert float(rows[0]["cost / scipy's"]) < 1.05
    assert [row["cost / scipy's"] for row in rows[1:]] == ["1.0000", "1.0000"]
    assert all(float(row["scipy's / ours"]) > 0 for row in rows)
