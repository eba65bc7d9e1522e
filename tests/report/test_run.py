"""The page of a run: its figures by hand, and what a browser makes of it."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dive.errors import UserError
from dive.report.page import HTML, compact, number, percent
from dive.report.run import (
    POINTS,
    affinity_figure,
    computing_seconds,
    contaminated_rows,
    expert_rows,
    mean_score,
    own_share,
    plan_rows,
    read_curves,
    recovered,
    task_figure,
    task_rows,
    text_figure,
    visible,
    write_report,
)
from dive.units import duration
from tests.browser import browse, shapes
from tests.report.made import results as made
from tests.report.made import stage
from tests.workplace import WORDS, Workplace

FIGURES = {"routing", "texts", "domains", "affinity", "matrix", "overlap", "curves", "load", "entropy"}
DOMAIN = "<script>alert(1)</script>"
ENDING = "</script><script>alert(2)</script>"


@pytest.fixture(scope="module")
def finished(workplace: Workplace) -> Path:
    """Directory of a finished run."""
    workplace.run("reported")
    return workplace.root / "reported"


@pytest.fixture
def hostile(finished: Path, tmp_path: Path) -> Path:
    """The same run with markup wherever text comes from data."""
    directory = tmp_path / "run"
    shutil.copytree(finished, directory, ignore=shutil.ignore_patterns("checkpoint", "plots"))
    text = (directory / "results.json").read_text().replace('"cats', json.dumps(DOMAIN)[:-1])
    results = json.loads(text)
    results["run"]["command"].append(ENDING)
    results["run"]["config"]["model"] |= {"name": ENDING, "path": "embedded"}
    for sample in results["generations"]:
        sample |= {"moe": ENDING, "dense": ENDING, "prompt": ENDING}
    results["routing"]["tokens"][0] = [{"id": 1, "share": 0.5, "lift": 2.0, "text": ENDING}]
    results["routing"]["texts"][0]["tokens"][0] = ENDING
    results["stages"][-1]["tasks"] = {DOMAIN: {ENDING: 0.5}}
    results["plan"]["planned"] |= {"device": ENDING}
    (directory / "results.json").write_text(json.dumps(results))
    (directory / "config.yaml").write_text(f"x: '</pre>{ENDING}'\n")
    return directory


class Elements(HTMLParser):
    """Counts script elements and collects the text outside of them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts, self.text, self._inside = 0, "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._inside = tag in ("script", "style")
        self.scripts += tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._inside else data


def test_every_run_has_its_page(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    elements = Elements(page)
    results = json.loads((finished / "results.json").read_text())
    assert number(results["stages"][-1]["perplexity"]["mean"]) in elements.text
    assert "python -m dive.train" in elements.text
    for sample in results["generations"]:
        assert sample["moe"].split()[0] in elements.text
    assert len(page) < 1_000_000
    assert set(re.findall(r'data-figure="(\w+)"', page)) == FIGURES


def test_the_page_shows_one_time(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8").replace("\u00a0", " ")
    seconds = json.loads((finished / "results.json").read_text())["plan"]["actual"]["seconds"]
    took = duration(seconds)
    assert f"<span>computing time</span><b>{took}</b><span>on cpu, evaluation included</span>" in page
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page.partition("whole run</td>")[2].partition("</tr>")[0])
    assert cells[2] == took
    assert "<th>time</th>" not in page
    assert "This run itself" not in page


def test_the_page_fetches_nothing(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"<(?:link|img|script|iframe)[^>]+(?:src|href)=[\"'](?!data:)", page)
    assert "default-src 'none'" in page
    assert "@import" not in page


def test_text_from_data_is_escaped(hostile: Path) -> None:
    plain = Elements(write_report(hostile).read_text(encoding="utf-8"))
    assert plain.scripts == 1 + 4  # the data; D3, Plot and two of ours
    assert DOMAIN in plain.text
    assert (
        plain.text.count(ENDING) >= 3 * 2 + 6
    )  # texts of two groups; name, command, metric, cost, configuration, token


def test_chromium_draws_every_figure_without_a_complaint(finished: Path, tmp_path: Path) -> None:
    page = browse(finished / "report.html", tmp_path)
    assert page.console == []
    assert set(page.figures) == FIGURES
    least = {"routing": 4 * 2, "domains": 4 * 5, "affinity": 4 * 4 + 3, "matrix": 4 * 4, "overlap": 2 * 2}
    least["texts"] = 0
    assert page.figures["texts"].count("<span title=") == 32
    for name, html in page.figures.items():
        assert shapes(html) >= least.get(name, 2), name


def test_chromium_runs_nothing_from_data(hostile: Path, tmp_path: Path) -> None:
    page = browse(write_report(hostile), tmp_path)
    assert page.console == []
    assert set(page.figures) == FIGURES | {"tasks"}
    assert DOMAIN.replace("<", "&lt;").replace(">", "&gt;") in page.figures["tasks"]
    assert Elements(page.dom).scripts == 1 + 4
    assert DOMAIN.replace("<", "&lt;").replace(">", "&gt;") in page.figures["routing"]
    assert ENDING.replace("<", "&lt;").replace(">", "&gt;") in page.figures["texts"]


def test_chromium_refuses_a_script_that_is_not_ours(finished: Path, tmp_path: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page.replace("</main>", "<script>document.title = 'taken'</script></main>"))
    seen = browse(tmp_path / "page.html", tmp_path / "profile")
    assert "<title>taken" not in seen.dom
    assert any("Content Security Policy" in line for line in seen.console)


def test_a_run_under_way_has_a_page_that_says_so(finished: Path, tmp_path: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    begun = {key: results[key] for key in ("run", "evaluation")} | {"groups": [], "parameters": {}, "routing": {}}
    (tmp_path / "results.json").write_text(json.dumps(begun | {"timings": {}, "stages": results["stages"][:2]}))
    assert "not finished" in Elements(write_report(tmp_path).read_text()).text
    seen = browse(tmp_path / "report.html", tmp_path / "profile")
    assert seen.console == []
    assert set(seen.figures) == {"domains"}
    (tmp_path / "results.json").write_text(json.dumps(begun | {"timings": {}, "stages": []}))
    with pytest.raises(UserError, match=r"results\.json has no stage yet"):
        write_report(tmp_path)


def test_a_run_of_before_the_map_has_its_page(finished: Path, tmp_path: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    results["affinity"] = None
    del results["run"]["config"]["affinity"]["mapped"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_report(tmp_path)
    assert "Nothing was mined in this run." in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("overrides", [["moe.experts=1"], ["affinity=random", "moe.top_k=2"], ["retrain=none"]])
def test_other_runs_have_pages_without_empty_figures(
    workplace: Workplace, overrides: list[str], tmp_path: Path
) -> None:
    settings = [s for s in workplace.settings if "retrain.stages" not in s or "retrain=none" not in overrides]
    place = Workplace.__new__(Workplace)
    place.root, place.settings = workplace.root, settings
    place.run(f"page {overrides[0]}", *overrides)
    seen = browse(workplace.root / f"page {overrides[0]}" / "report.html", tmp_path)
    assert seen.console == []
    assert set(seen.figures) == set(re.findall(r'<figure data-figure="(\w+)"', seen.dom))
    assert all(shapes(html) + html.count("<span title=") > 1 for html in seen.figures.values())


@pytest.mark.parametrize(("name", "text"), [("missing", None), ("cut", '{"run":'), ("other", "[1, 2]"), ("odd", "{}")])
def test_what_is_no_run_is_refused(name: str, text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results\.json: "):
        write_report(tmp_path)


# ---------------------------------------------------------------------------------------------------- figures by hand


def test_half_of_the_loss_is_won_back() -> None:
    stages = [stage("dense", 10.0), stage("pruned", 40.0), stage("reconstructed", 20.0)]
    assert recovered(made(stages=stages)) == pytest.approx(0.5)  # log 4 lost, log 2 left
    assert recovered(made(stages=[stages[1], stages[0], stages[2]])) == pytest.approx(0.5)  # whatever their order
    assert recovered(made(stages=stages[:2])) is None
    assert recovered(made(stages=[stage("dense", 10.0), stage("pruned", 9.0), stage("x", 8.0)])) is None


def test_experts_and_the_domains_they_serve() -> None:
    share = {"a": [0.7, 0.3], "b": [0.6, 0.4], "c": [0.1, 0.9]}
    results = made(routing={"share": share}, groups=[["a"], ["b", "c"]])
    first, second = expert_rows(results)
    assert first["first_choice_of"] == ["a", "b"]
    assert second["first_choice_of"] == ["c"]
    assert (first["name"], second["name"]) == ("a", "c")  # 0.7 and 0.9 are 1.5 times the mean load, 0.6 and 0.4 are not
    assert second["served"] == [("c", 0.9), ("b", 0.4), ("a", 0.3)]
    assert second["load"] == pytest.approx((0.3 + 0.4 + 0.9) / 3)
    assert own_share(results) == pytest.approx((0.7 + 0.4 + 0.9) / 3)
    assert own_share(made(routing={"share": share}, groups=[["a", "b", "c"]])) is None
    assert expert_rows(made(routing={}, groups=[])) == expert_rows(made()) == []


def test_the_tokens_of_experts_and_texts_are_shown_where_they_are() -> None:
    known = [[{"id": 3, "share": 0.8, "lift": 1.6, "text": " a\n"}], []]
    texts = [{"domain": "d", "ids": [3, 4], "experts": ["0 1", "1 1"], "tokens": [" a\n", "b"]}]
    results = made(routing={"share": {"d": [0.5, 0.5]}, "tokens": known, "texts": texts})
    assert [row["tokens"] for row in expert_rows(results)] == [["␣a↵"], []]
    assert text_figure(results) == [{"domain": "d", "tokens": [" a\n", "b"], "experts": [[0, 1], [1, 1]]}]
    older = made(routing={"share": {"d": [0.5, 0.5]}})
    assert [row["tokens"] for row in expert_rows(older)] == [[], []]
    assert text_figure(older) == text_figure(made()) == []
    assert visible("\t x") == "⇥␣x"


def test_the_tree_has_the_colours_of_the_groups() -> None:
    # a and b join first, then c joins them; {a, b} and {c} are the groups
    mined: dict[str, Any] = {"domains": ["a", "c", "b"], "perplexity": [[1.0, 4, 1], [4, 1, 4], [1, 4, 1]]}
    mined["tree"] = [[0, 2, 0.1, 2], [1, 3, 1.5, 3]]
    figure = affinity_figure(made(affinity=mined, groups=[["a", "b"], ["c"]]))
    assert figure is not None
    assert sorted(figure["order"][1:]) == [0, 2] or sorted(figure["order"][:2]) == [0, 2]
    assert {link["group"]: max(link["distance"]) for link in figure["tree"]} == {"0": 0.1, "": 1.5}
    assert figure["affinity"] == [[1.0, 0.25, 1.0], [0.25, 1.0, 0.25], [1.0, 0.25, 1.0]]
    del mined["tree"]
    older = affinity_figure(made(affinity=mined, groups=[["a", "b"], ["c"]]))
    assert older is not None
    assert older["order"] == [0, 2, 1]
    assert older["tree"] is None


def test_curves_of_any_name_are_read_and_follow_one_another(tmp_path: Path) -> None:
    for name, rows in (("one", 2), ("two", 1000)):
        (tmp_path / "csv" / name).mkdir(parents=True)
        heads = ("tokens", "loss", "kl/x", "load/layer_01/expert_3", "entropy/layer_00")
        lines = [",".join([f"{name}/{head}" for head in heads] + ["step"])]
        lines += [f"{(i + 1) * 10},{i},,{i / 2},7,{i}" for i in range(rows)]
        (tmp_path / "csv" / name / "metrics.csv").write_text("\n".join(lines) + "\n")
    one, two = read_curves(tmp_path, ["dense", "one", "two"])
    assert one["tokens"] == [10, 20]
    assert one["scalars"] == {"loss": [0, 1], "kl/x": [None, None]}
    assert one["experts"] == {"load": {1: {3: [0, 0.5]}}}
    assert one["layers"] == {"entropy": {0: [7, 7]}}
    assert len(two["tokens"]) == POINTS
    assert (two["tokens"][0], two["tokens"][-1]) == (30, 20 + 10_000)
    assert two["scalars"]["loss"][-1] == 999


def test_tasks_are_shown_where_they_are() -> None:
    measured = {"piqa": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "piqa"}}
    stages = [stage("dense", 1.0), stage("retrain", 2.0, tasks=measured)]
    assert task_rows(made(stages=stages)) == [
        {"task": "piqa", "metric": "acc,none", "scores": [(None, None), (0.5, 0.1)]}
    ]


def test_an_expert_that_no_domain_prefers_is_mixed() -> None:
    share = {"a": [0.5, 0.5, 0.0], "b": [0.4, 0.6, 0.0], "c": [0.5, 0.5, 0.0]}
    assert [row["name"] for row in expert_rows(made(routing={"share": share}))] == ["mixed", "mixed", "mixed"]
    share = {name: [0.9, 0.1] for name in "abc"} | {name: [0.1, 0.9] for name in "defghi"}
    assert expert_rows(made(routing={"share": share}))[0]["name"] == "a, b"  # two at most


def test_bars_are_standard_errors_and_the_mean_has_its_own() -> None:
    def stages(*scores: tuple[float, Any]) -> list[dict[str, Any]]:
        measured = [
            {"acc,none": acc, "acc_stderr,none": error, "acc_norm,none": 0.9, "alias": "t"} for acc, error in scores
        ]
        tasks = dict(zip(("piqa", "sciq"), measured, strict=True)) | {"wiki": {"word_perplexity,none": 20.0}}
        return [stage("dense", 1.0), stage("retrain", 2.0, tasks=tasks)]

    piqa, sciq, mean = task_figure(made(stages=stages((0.5, 0.3), (0.7, 0.4))))
    assert (piqa["task"], piqa["metric"]) == ("piqa", "acc")
    assert piqa["scores"] == [{"value": None, "error": None}, {"value": 0.5, "error": 0.3}]
    assert sciq["scores"][1] == {"value": 0.7, "error": 0.4}
    assert mean["scores"][0] == {"value": None, "error": None}
    assert mean["scores"][1] == pytest.approx({"value": 0.6, "error": 0.25})  # half of the root of 0.09 + 0.16
    without = task_figure(made(stages=stages((0.5, "N/A"), (0.7, 0.4))))
    assert [row["scores"][1]["error"] for row in without] == [None, 0.4, None]
    asked = {"shots": 0, "limit": None, "metric": "acc_norm,none", "questions": 1, "members": []}
    evaluation = {"domains": [], "sets": [], "tasks": {"piqa": asked}}
    chosen = task_figure(made(stages=stages((0.5, 0.3), (0.7, 0.4)), evaluation=evaluation))
    assert chosen[0]["metric"] == "acc_norm"
    assert task_figure(made(stages=[stage("dense", 1.0)])) == []
    assert mean_score([(0.5, None)]) == (0.5, None)


def test_texts_that_training_has_seen_in_part_are_named(finished: Path, tmp_path: Path) -> None:
    def overlap(documents: int, found: int) -> dict[str, Any]:
        share = found / documents
        more = {
            "long_enough": documents,
            "ngrams": 9,
            "ngrams_found": found,
            "ngram_share": share,
            "sources": {"b": found},
        }
        return {"documents": documents, "found": found, "share": share} | more

    found = {
        "ngram": 13,
        "domains": {"a": overlap(4, 1), "b": overlap(4, 0)},
        "sets": {},
        "tasks": {"t": overlap(2, 1)},
    }
    rows = contaminated_rows(made(contamination=found))
    assert [(row["kind"], row["name"], row["share"]) for row in rows] == [("task", "t", 0.5), ("domain", "a", 0.25)]
    assert contaminated_rows(made()) == contaminated_rows(made(contamination={})) == []
    results = json.loads((finished / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(results | {"contamination": found}))
    text = " ".join(Elements(write_report(tmp_path).read_text()).text.split())
    assert "2 of 3 texts share 13 words in a row with it" in text


def test_what_engines_made_of_the_export_is_shown_until_it_is_written_again(finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished, directory, ignore=shutil.ignore_patterns("plots", "*.safetensors"))
    assert "In engines" not in write_report(directory).read_text()
    rows = [
        {"engine": "transformers", "version": "5.1", "verdict": "reference", "perplexity": 12.5, "equal": 8},
        {
            "engine": "vllm",
            "version": "1",
            "verdict": "differs",
            "reason": ENDING,
            "difference": 0.5,
            "perplexity": 13.0,
            "equal": 2,
        },
    ]
    verified = {
        "checkpoint": "elsewhere/checkpoint",
        "model": "M",
        "texts": "text",
        "predicted": 1200,
        "continuations": 8,
    }
    verified |= {"tokens": 16, "tolerance": 1e-3, "date": "2026-01-01", "engines": rows}
    (directory / "verify.json").write_text(json.dumps(verified))
    page = write_report(directory).read_text()
    assert ENDING not in page
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page.partition('id="engines"')[2].partition("</table>")[0])
    assert cells[:6] == ["transformers", "5.1", "–", "12.5000", "8 of 8", "reference"]
    assert cells[6:11] == ["vllm", "1", "5.0e-01", "13.0000", "2 of 8"]
    assert "1,200 tokens of text" in page
    os.utime(directory / "checkpoint/config.json")
    assert "In engines" not in write_report(directory).read_text()


def test_the_plan_stands_beside_what_it_took() -> None:
    figures: dict[str, Any] = {"seconds": 1.0, "host_bytes": 2, "device_bytes": 0, "disk_bytes": 3}
    planned: dict[str, Any] = {"device": "h100", "stages": [figures | {"name": "mining", "flops": 4.0}], **figures}
    planned["disk_bytes"] = {"store": 5, "export": 6, "checkpoints": 7}
    took = {"seconds": 8.0, "host_bytes": 9, "device_bytes": 0, "disk_bytes": 10}
    actual = {"stages": [took | {"name": "mining", "reused": True}], **took}
    results = made(plan={"planned": planned, "actual": actual}, stages=[stage("x", 1.0, seconds=3.0)])
    mining, whole = plan_rows(results)
    assert computing_seconds(results) == whole["seconds"][1] == 8.0
    assert computing_seconds(made(stages=[stage("x", 1.0, seconds=3.0)])) == 3.0
    assert (mining["seconds"], mining["disk_bytes"], mining["flops"]) == ((1.0, 8.0), (3, 10), 4.0)
    assert mining["reused"]
    assert whole["disk_bytes"] == (5 + 6, 10)
    assert plan_rows(made()) == []


def test_numbers_for_people() -> None:
    assert [number(v) for v in (24.0, 0.012345, 12345.6, None, float("nan"))] == [
        "24.00",
        "0.01235",
        "12,346",
        "–",
        "–",
    ]
    assert percent(0.256) == "26\u00a0%"
    assert compact({"a": [1.23456789, float("inf")], 1: (2, "x")}) == {"a": [1.2346, None], "1": [2, "x"]}


def test_vendored_libraries_have_their_licences_and_end_no_script() -> None:
    for name, licence in (("d3-7.9.2.min.js", "LICENSE-d3"), ("plot-0.6.17.umd.min.js", "LICENSE-plot")):
        source = (HTML / "vendor" / name).read_text(encoding="utf-8")
        assert name.split("-")[1].split(".min")[0].removesuffix(".umd") in source[:200]
        assert "</script" not in source
        assert "Permission to use, copy, modify" in (HTML / "vendor" / licence).read_text()


def test_all_words_have_a_row(finished: Path) -> None:
    text = Elements((finished / "report.html").read_text()).text
    assert all(domain in text for domain in WORDS)


def test_wandb_keeps_a_copy(workplace: Workplace) -> None:
    workplace.run("with wandb", "logger=[csv,wandb]", "retrain.stages.retrain.tokens=512")
    (copy,) = (workplace.root / "with wandb/wandb").glob("offline-run-*/files/report.html")
    assert copy.read_bytes() == (workplace.root / "with wandb/report.html").read_bytes()
