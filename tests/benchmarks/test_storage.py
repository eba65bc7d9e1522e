"""The benchmark of storage runs, and says what rests where."""

import subprocess
import sys
from pathlib import Path

from tests.workplace import environment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "storage.py"


def test_a_table_with_a_row_for_each_storage(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--length", "32", "--rows", "dense", "indexed"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert rows[0][2].strip() == "1.00"
    assert len(rows) == 2
    assert all(float(row[1].split()[0]) > 0.1 for row in rows)
