"""What is printed at the end of a run, where there is no terminal, and the card of its model."""

import json
import re
from typing import Any

import pytest
from rich.table import Table

from dive.progress import show
from dive.report.text import fenced_json, markdown, model_card, model_name, results_table, task_tables
from tests.report.made import results, stage

CONFIG = {"model": {"name": "m", "path": "a/m"}, "moe": {"experts": 2, "top_k": 1}, "pruning": {"ratio": 0.5}}
SIZES = dict.fromkeys(("dense", "total", "active", "trained"), 1)
SHARE = {"law": [0.7, 0.3], "code": [0.1, 0.9], "news": [0.5, 0.5], "maths": [0.2, 0.8]}


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
    card = model_card(results(CONFIG, groups=[], parameters=SIZES, routing={"share": SHARE}))
    assert "- expert 0: law 70%, news 50%, maths 20%\n- expert 1: code 90%, maths 80%, news 50%\n" in card
    groups = [["law", "news"], ["code", "maths"]]
    grouped = model_card(results(CONFIG, groups=groups, parameters=SIZES, routing={"share": SHARE}))
    assert "## Domains of each expert\n\n- expert 0: law, news\n- expert 1: code, maths\n" in grouped
    assert "expert 0" not in model_card(results(CONFIG, groups=[], parameters=SIZES, routing={}))


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
    config = CONFIG | {"model": {"name": name, "path": path}}
    card = model_card(results(config, groups=[], parameters=SIZES, routing={}))
    assert f"# Mixture-of-Experts from {markdown(called)}\n" in card


@pytest.mark.parametrize("grouped", [True, False])
def test_the_card_has_no_markup_of_its_data(grouped: bool) -> None:
    evil = "<script>alert(1)</script> [x](http://y) **b** `c` | d\n\n# e\n```\n<img src=x onerror=f()>"
    config = json.loads(json.dumps(CONFIG)) | {"eval": {"sets": {evil: {"path": evil}}}}
    config["model"] = {"name": evil, "path": evil}
    groups = [[evil], ["law"]] if grouped else []
    card = model_card(
        results(config, groups=groups, parameters=SIZES, routing={"share": {evil: [1, 0], "law": [0, 1]}})
    )
    assert not re.search(r"<\s*[a-z/!]", card, flags=re.IGNORECASE)
    for line in card.split("## Configuration")[0].splitlines()[5:]:
        assert not re.search(r"(?<!\\)[`*\[]", line)
        assert not line.startswith("# e")
    (fence, block) = re.findall(r"^(`{3,})json\n(.*?)^\1$", card, flags=re.MULTILINE | re.DOTALL)[0]
    assert json.loads(block) == config
    assert card.rstrip().endswith(fence)


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


def test_the_card_says_what_stands_beside_the_experts_and_where_it_is_not_served() -> None:
    config = json.loads(json.dumps(CONFIG))
    plain = model_card(results(config, groups=[], parameters=SIZES, routing={}))
    assert "shared expert" not in plain.split("## Configuration")[0]
    assert "Not in every engine" not in plain
    config["moe"] |= {"shared_expert": 0.25, "dense_layers": [0, 29]}
    notes = ["llama.cpp knows no dense layers in this class."]
    card = model_card(results(config, groups=[], parameters=SIZES, routing={}), notes)
    assert "25% of what is left of it is one shared expert, which every token meets. Layers 0, 29 stay dense" in card
    assert "> **Not in every engine.** llama.cpp knows no dense layers in this class.\n" in card
