"""Figures of a run, written as PNG; :func:`affinity_map` and :func:`routing_map` draw for notebooks as well.

A figure is a function of what a run found, and a line in :data:`FIGURES`: then it is drawn at the end of every run, logged to
W&B and, where the page has no interactive one in its place, shown in the report. Shapes: n domains, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy.cluster.hierarchy import dendrogram

from dive.affinity.grouping import affinity
from dive.results import Results

MAP = "viridis"

Curves = Mapping[str, Sequence[Mapping[str, float]]]
"""{retraining stage: what it logged, a dictionary a step with ``tokens`` and ``loss``}"""


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure of a run."""

    draw: Callable[[Results, Curves], Figure | None]
    """None where a run has nothing that it could show."""
    caption: str | None = None
    """Below it in the report; none where the page draws this itself."""


def affinity_heatmap(results: Results, curves: Curves) -> Figure | None:
    """Affinity matrix (n, n) with rows and columns in the order of the dendrogram beside it; groups colour the labels."""
    mined = results.affinity
    if mined is None or mined.tree is None or len(mined.domains) < 2:
        return None
    values = mined.similarity if mined.perplexity is None else mined.perplexity
    assert values is not None
    return affinity_map(
        values,
        mined.domains,
        tree=mined.tree,
        groups=mined.groups or results.groups or [],
        similarity=str(mined.measure) if mined.perplexity is None else None,
    )


def affinity_map(
    values: ArrayLike,
    domains: Sequence[str],
    *,
    tree: ArrayLike,
    groups: Sequence[Sequence[str]] = (),
    similarity: str | None = None,
) -> Figure:
    """Map of the domains' affinity in the order of their dendrogram.

    Args:
        values: (n, n) perplexities, see :func:`dive.cross_domain_perplexity`.
        domains: names of its rows and columns.
        tree: (n - 1, 4), see :class:`dive.affinity.grouping.Clustering`.
        groups: of domains, which colour the labels.
        similarity: name of a measure, where the values are similarities by it instead.
    """
    shown = affinity(values) if similarity is None else np.asarray(values)
    n = len(domains)
    size = max(4.5, 0.32 * n)
    figure = Figure(figsize=(size * 1.6, size), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 3.2])
    drawn = dendrogram(
        np.asarray(tree),
        ax=left,
        orientation="left",
        no_labels=True,
        color_threshold=0,
        above_threshold_color="#555555",
    )
    order = drawn["leaves"][::-1]
    left.set_xlabel("distance, 1 − r")
    left.spines[["top", "right", "left"]].set_visible(False)
    image = right.imshow(shown[np.ix_(order, order)], cmap=MAP, aspect="auto")
    group_of = {domain: number for number, group in enumerate(groups) for domain in group}
    labels = [f"{domains[i]} [{group_of[domains[i]]}]" if domains[i] in group_of else domains[i] for i in order]
    right.set_xticks(range(n), [domains[i] for i in order], rotation=90, fontsize=8)
    right.set_yticks(range(n), labels, fontsize=8)
    colours = mpl.colormaps["tab10"]
    for tick, i in zip(right.get_yticklabels(), order, strict=True):
        if domains[i] in group_of:
            tick.set_color(colours(group_of[domains[i]] % 10))
    if similarity is not None:
        right.set_ylabel("domain [group]")
        right.set_title(f"Domain affinity: {similarity}", fontsize=9)
        figure.colorbar(image, ax=right, label="similarity (1 = the same)")
    else:
        right.set_xlabel("measured on")
        right.set_ylabel("pruned on [group]")
        right.set_title("Domain affinity: best perplexity for a domain / perplexity of this pruned model", fontsize=9)
        figure.colorbar(image, ax=right, label="affinity (1 = as good as the best)")
    return figure


def routing_heatmap(results: Results, curves: Curves) -> Figure | None:
    """Share of each domain's tokens that each expert gets, averaged over layers; a dot marks the expert's own domains."""
    return routing_map(results.share, results.groups or []) if results.share else None


def routing_map(share: Mapping[str, Sequence[float]], groups: Sequence[Sequence[str]] = ()) -> Figure:
    """Map of who is routed where.

    Args:
        share: {domain: (E,)}, the share of its tokens that each expert gets.
        groups: the domains that each expert begins with, which get a dot.
    """
    domains = list(share)
    values = np.array([share[domain] for domain in domains])
    figure = Figure(figsize=(1.8 + 0.55 * values.shape[1], 1.2 + 0.28 * len(domains)))
    axes = figure.subplots()
    image = axes.imshow(values, cmap=MAP, aspect="auto", vmin=0)
    for expert, group in enumerate(groups):
        for domain in group:
            if domain in share and expert < values.shape[1]:
                axes.plot(expert, domains.index(domain), "o", color="white", markersize=4)
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(len(domains)), domains, fontsize=8)
    axes.set_xlabel("expert")
    axes.set_title("Routing share (mean over layers)", fontsize=9)
    figure.colorbar(image, ax=axes, label="share of the domain's tokens")
    return figure


def loss_curves(results: Results, curves: Curves) -> Figure | None:
    """Training loss over tokens, the stages one after another."""
    if not curves:
        return None
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    before = 0.0
    for name, curve in curves.items():
        tokens = [before + point["tokens"] for point in curve]
        axes.plot(tokens, [point["loss"] for point in curve], label=name, marker="." if len(curve) < 30 else None)
        before = tokens[-1] if tokens else before
    axes.set_xlabel("retraining tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(title="stage")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


FIGURES: Mapping[str, Plot] = {
    "affinity": Plot(affinity_heatmap),
    "routing": Plot(routing_heatmap),
    "loss": Plot(loss_curves),
}
"""{name of the file: figure}"""


def draw(results: Results, curves: Curves, folder: Path) -> list[Path]:
    """Write every figure that the run has something for, to ``<folder>/<name>.png``."""
    written = []
    with mpl.rc_context({"text.parse_math": False}):  # a domain may have dollars in its name
        for name, plot in FIGURES.items():
            figure = plot.draw(results, curves)
            if figure is not None:
                folder.mkdir(parents=True, exist_ok=True)
                written.append(folder / f"{name}.png")
                figure.savefig(written[-1], dpi=150, bbox_inches="tight")
    return written
