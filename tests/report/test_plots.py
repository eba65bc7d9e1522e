"""The figures that a run writes, and how one more gets into the report."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from dive.affinity.grouping import cluster_domains
from dive.report import plots
from dive.report.plots import FIGURES, Curves, Plot, draw
from dive.report.run import write_report
from dive.results import Results
from tests.browser import browse
from tests.report.made import results
from tests.workplace import Workplace

CURVES = {"router": [{"tokens": 8.0, "loss": 3.0}], "retrain": [{"tokens": 8.0, "loss": 2.0}]}


def test_a_figure_is_drawn_where_there_is_something_to_show(tmp_path: Path) -> None:
    assert draw(results(), {}, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
    mined = {"domains": ["a", "$\\x$", "b"], "perplexity": [[1.0, 4, 1], [4, 1, 4], [1, 4, 1]]}
    mined["tree"] = [[0, 2, 0.1, 2], [1, 3, 1.5, 3]]
    full = results(
        affinity=mined, groups=[["a", "b"], ["$\\x$"]], routing={"share": {"a": [0.7, 0.3], "$\\x$": [0, 1]}}
    )
    written = draw(full, CURVES, tmp_path)
    assert [file.stem for file in written] == ["affinity", "routing", "loss"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)


def test_a_notebook_draws_the_figures_without_a_run() -> None:
    # Column by column over the best: a and c serve each other, b serves itself alone.
    perplexity = [[1.0, 4.0, 2.0], [2.0, 1.0, 4.0], [1.0, 4.0, 2.0]]
    found = cluster_domains(perplexity, ["a", "b", "c"], experts=2)
    figure = plots.affinity_map(perplexity, ["a", "b", "c"], tree=found.tree, groups=found.groups)
    axes = figure.axes[1]
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert sorted(labels) == ["a [0]", "b [1]", "c [0]"]
    order = ["abc".index(label[0]) for label in labels]
    expected = np.array([[1, 0.25, 1], [0.5, 1, 0.5], [1, 0.25, 1]])
    assert axes.images[0].get_array().data.tolist() == expected[np.ix_(order, order)].tolist()

    axes = plots.routing_map({"a": [0.7, 0.3], "b": [0.2, 0.8]}, [["a"], ["b"]]).axes[0]
    assert axes.images[0].get_array().data.tolist() == [[0.7, 0.3], [0.2, 0.8]]
    assert [(*map(int, dot.get_xdata()), *map(int, dot.get_ydata())) for dot in axes.lines] == [(0, 0), (1, 1)]


def test_stages_follow_one_another() -> None:
    figure = plots.loss_curves(results(), CURVES)
    assert figure is not None
    assert [[*line.get_xdata()] for line in figure.axes[0].lines] == [[8.0], [16.0]]


def test_one_function_and_one_line_are_a_figure_in_the_report(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def sizes(results: Results, curves: Curves) -> Figure | None:
        figure = Figure()
        figure.subplots().bar(["total", "active"], [results.parameters.total or 0, results.parameters.active or 0])
        return figure

    monkeypatch.setattr(plots, "FIGURES", {**FIGURES, "probe": Plot(sizes, "Parameters <b>of</b> the model.")})
    monkeypatch.setattr("dive.report.run.FIGURES", plots.FIGURES)
    workplace.run("pictured")
    assert (workplace.root / "pictured/plots/probe.png").is_file()
    page = (workplace.root / "pictured/report.html").read_text(encoding="utf-8")
    assert page.count('alt="probe"') == 1
    assert "Parameters &lt;b&gt;of&lt;/b&gt; the model." in page
    shutil.copy(workplace.root / "pictured/report.html", tmp_path)
    shutil.rmtree(workplace.root / "pictured/plots")
    assert "<img " not in write_report(workplace.root / "pictured").read_text(encoding="utf-8")
    assert browse(tmp_path / "report.html", tmp_path / "profile").console == []  # the security policy lets it through
