"""What is printed at the end of a run, where there is no terminal, and what of it is Markdown."""

import json
from typing import Any

import pytest
from rich.table import Table

from dive.progress import show
from dive.report.text import fenced_json, markdown, model_name, results_table, task_tables
from tests.report.made import results, stage


def test_names_are_printed_as_they_are_and_lines_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "report   " + "/a directory [red]/[/b]:smile:" * 9
    table = Table("domain")
    table.add_row("[law]")
    show(path, table)
    out = capsys.readouterr().out
    assert path in out.splitlines()
    assert "[law]" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("name", "path", "called"),
    [
        ("tiny", "embedded", "tiny"),
        ("local", "/models/My-Llama/", "My-Llama"),
        ("local", "models/Smol.Q4_1.gguf", "Smol.Q4_1"),
        ("local", ".", "local"),
        ("llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", "Llama-3.2-1B-Instruct"),
        ("local", "/cache/models--org--Some-Model/snapshots/0123abc", "Some-Model"),
    ],
)
def test_a_model_is_called_as_on_the_hub_or_by_its_directory(name: str, path: str, called: str) -> None:
    assert model_name({"model.name": name, "model.path": path}) == called


def test_plain_names_stay_as_they_are() -> None:
    assert markdown("model_code, C++ & (law-2)") == "model_code, C++ &amp; (law-2)"
    assert markdown("_a_ a|b") == r"\_a\_ a\|b"


def test_nothing_inside_closes_the_fence() -> None:
    value = {"a": "```` ```", "b": ["<b>", "&amp;"]}
    first, text, last = fenced_json(value)
    assert (first, last) == ("`````json", "`````")
    assert json.loads(text) == value


def columns(table: Table) -> dict[str, list[Any]]:
    return {str(column.header): list(column.cells) for column in table.columns}


def test_tasks_say_how_many_questions_were_asked() -> None:
    asked = {"limit": 40, "metric": None, "members": []}
    tasks = {
        "piqa": asked | {"shots": 0, "questions": 40},
        "mmlu": asked | {"shots": 5, "questions": 1240, "members": ["law", "art"]},
        "own": asked | {"shots": None, "questions": 7},
    }
    scores = {name: {"acc,none": 0.5, "acc_stderr,none": 0.1} for name in ("piqa", "law", "own")}
    (table,) = task_tables(
        results(
            evaluation={"domains": [], "sets": [], "tasks": tasks},
            stages=[stage("dense", 1.0), stage("retrain", 2.0, tasks=scores, tasks_mean=0.5)],
        )
    )
    found = columns(table)
    assert list(found) == ["task", "shots", "questions", "metric", "retrain"]
    assert found["task"] == ["piqa", "law", "own", "mean"]
    assert found["shots"] == ["0", "5", "–", ""]
    assert found["questions"] == ["40", "–", "7", ""]
    assert found["retrain"] == ["50.00% ± 10.00%"] * 3 + ["50.00%"]


def test_long_stages_are_timed_as_on_a_clock() -> None:
    table = results_table(
        results(stages=[stage("dense", 2.0, seconds=8.21), stage("x", 1.5, seconds=3847.0, reused=True)])
    )
    assert columns(table)["time"] == ["8.2 s", "1:04:07 (reused)"]
