"""What is printed at the end of a run, where there is no terminal."""

import pytest
from rich.table import Table

from dive.report.text import model_card, show


def test_names_are_printed_as_they_are_and_lines_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "report   " + "/a directory [red]/[/b]:smile:" * 9
    table = Table("domain")
    table.add_row("[law]")
    show(path, table)
    out = capsys.readouterr().out
    assert path in out.splitlines()
    assert "[law]" in out
    assert "\x1b" not in out


def test_the_card_names_the_domains_of_experts_whatever_they_began_with() -> None:
    results = {
        "groups": [],
        "parameters": dict.fromkeys(("dense", "total", "active", "trained"), 1),
        "stages": [],
        "routing": {"share": {"law": [0.7, 0.3], "code": [0.1, 0.9], "news": [0.5, 0.5], "maths": [0.2, 0.8]}},
    }
    config = {"model": {"name": "m"}, "moe": {"experts": 2, "top_k": 1}, "pruning": {"ratio": 0.5}}
    card = model_card(results, config, "m")
    assert "- expert 0: law 70%, news 50%, maths 20%\n- expert 1: code 90%, maths 80%, news 50%\n" in card
    grouped = model_card(results | {"groups": [["law", "news"], ["code", "maths"]]}, config, "m")
    assert "## Domains of each expert\n\n- expert 0: law, news\n- expert 1: code, maths\n" in grouped
    assert "expert 0" not in model_card(results | {"routing": {}}, config, "m")
