"""What is printed at the end of a run, where there is no terminal."""

import pytest
from rich.table import Table

from dive.report.text import show


def test_names_are_printed_as_they_are_and_lines_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "report   " + "/a directory [red]/[/b]:smile:" * 9
    table = Table("domain")
    table.add_row("[law]")
    show(path, table)
    out = capsys.readouterr().out
    assert path in out.splitlines()
    assert "[law]" in out
    assert "\x1b" not in out
