"""Counts, sizes, operations and durations as text."""

import subprocess
import sys

from dive.units import clock, count, duration, operations, precise, size


def test_every_figure_is_in_the_largest_unit_it_fills() -> None:
    assert (count(1_234_567), count(999), count(2e9)) == ("1.23 M", "999", "2 B")
    assert (size(484_704_256), size(999), size(1.35e10)) == ("485 MB", "999 B", "13.5 GB")
    assert (operations(1.2e15), operations(0), operations(2e6)) == ("1.2 PFLOP", "–", "2 MFLOP")
    assert (duration(5400), duration(0.25), duration(90)) == ("1.5 h", "0.25 s", "1.5 min")
    assert (precise(3_384_207_360), precise(21_358_592), precise(12)) == ("3.384 B", "21.36 M", "12")


def test_what_rounds_up_to_the_next_unit_stands_in_it() -> None:
    assert (count(999_999), size(999_700_000), duration(59.99), precise(999_999)) == ("1 M", "1 GB", "1 min", "1 M")
    assert size(1.2345e15) == "1,230 TB"


def test_a_clock_is_read_at_a_glance() -> None:
    assert [clock(s) for s in (0, 8.21, 59.94, 59.96, 303, 3599.6, 3847)] == [
        *("0.0 s", "8.2 s", "59.9 s", "1:00", "5:03", "1:00:00", "1:04:07")
    ]


def test_units_import_nothing_heavy() -> None:
    code = "import sys, dive.units; sys.exit(bool({'torch', 'rich', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
