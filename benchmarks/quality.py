"""Every way from one dense model to a smaller active one, at the same active size and the same retraining tokens.

    python benchmarks/quality.py                                      # the embedded model and domains
    python benchmarks/quality.py --model DIR --domains DIR            # your own
    python benchmarks/quality.py --quick                              # minutes on two cores

Each cell (method, setting, tokens, seed, fold) is a run of the whole pipeline on a shared store, and one file in
``<out>/cells``; a cell whose file is there is not run again, so the same command goes on where it stopped. Tables are
printed and written to ``<out>`` as ``quality.md``, ``quality.csv``, ``quality.json`` and ``quality.png``.
See docs/quality.md.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import logging
import math
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from dive.calibration_domains.local import domain_directories, split_file
from dive.calibration_domains.sampling import pieces
from dive.calibration_domains.texts import domain_names, load_domains
from dive.cli import composed
from dive.config import Config, Freezing, StageText, TextSource
from dive.errors import UserError
from dive.store import write_json

SPLIT_SEED = 0
"""Of the order in which domains are held out; not of a run, so that all seeds leave out the same."""
DEV_SHARE = 10
"""One in so many pieces of training text chooses the learning rate."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Size of the experts: ``ratio0.75-top1`` is an expert of a quarter of the channels, one active."""

    ratio: float
    top_k: int

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """
        Raises:
            UserError: not of the form ``ratio<R>-top<K>``, or more active channels than there are.
        """
        match = re.fullmatch(r"ratio(0?\.\d+)-top(\d+)", text)
        if match is None or int(match[2]) < 1 or int(match[2]) * (1.0 - float(match[1])) >= 1.0:
            raise UserError(f"--settings {text}: write ratio0.75-top1, with less than all channels active")
        return cls(float(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"ratio{self.ratio:g}-top{self.top_k}"

    @property
    def title(self) -> str:
        """``75% of every FFN pruned, 1 expert active``."""
        return f"{100 * self.ratio:g}% of every FFN pruned, {self.top_k} expert{'s' if self.top_k > 1 else ''} active"

    @property
    def single_ratio(self) -> float:
        """Ratio at which one expert is as wide as the ``top_k`` active ones together."""
        return 1.0 - self.top_k * (1.0 - self.ratio)


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table."""

    title: str
    overrides: Callable[[Setting], list[str]]
    """What makes the method; model, data, size, seed and tokens are added to it. Tokens of stages count as shares here."""


TEXT_ALONE = ("retrain.stages.retrain.teacher.logits=0", "retrain.stages.retrain.teacher.hidden=0")
"""Next-token cross-entropy alone, as every method but ours was published."""


def single(*overrides: str, retrain: Sequence[str] = TEXT_ALONE) -> Callable[[Setting], list[str]]:
    """One pruned expert of the whole active width."""
    return lambda size: [
        "moe=plain",
        *overrides,
        "moe.experts=1",
        "moe.top_k=1",
        f"pruning.ratio={size.single_ratio:g}",
        *retrain,
    ]


def mixture(*overrides: str) -> Callable[[Setting], list[str]]:
    """Experts of the setting's size, retrained on the text alone."""
    return lambda size: [*overrides, f"moe.top_k={size.top_k}", f"pruning.ratio={size.ratio:g}", *TEXT_ALONE]


def paper(size: Setting) -> list[str]:
    """The recipe of ``experiment=paper_1_8`` and ``paper_2_8`` but for optimiser, text and tokens; their shares are its own."""
    temperature = 0.05 if size.top_k == 1 else 0.5
    return [
        *("moe=plain", "pruning=flap", f"pruning.ratio={size.ratio:g}", f"moe.top_k={size.top_k}"),
        *("moe.plain.router_init=random", "retrain.noise=0.0005", "retrain=two_stages"),
        *(f"retrain.stages.router.temperature={temperature}", "retrain.stages.router.tokens=1"),
        *("retrain.stages.retrain.tokens=10", "retrain.stages.retrain.batch=8", "retrain.stages.router.batch=8"),
        *("retrain.stages.retrain.train.experts=full", "retrain.stages.retrain.learning_rate=1.5e-3"),
    ]


def unpruned(size: Setting) -> list[str]:
    """Nothing pruned, whatever the setting, so that hardly any text is calibrated on; the FFN is one expert, to be retrained."""
    return [
        *("moe=plain", "moe.experts=1", "moe.top_k=1", "pruning=flap", "pruning.compensation=none", "pruning.ratio=0"),
        "calibration_domains.samples=1",
    ]


def ours(size: Setting) -> list[str]:
    """The best recipe there is."""
    return ["experiment=dive_plus", f"moe.top_k={size.top_k}", f"pruning.ratio={size.ratio:g}"]


def end_to_end(size: Setting) -> list[str]:
    """Ours at as many calibration tokens (8 × 23 × 256, and 139 k), three quarters of them for all layers together."""
    local = ("calibration_domains.samples=8", "moe.refined.steps=100")
    return [*ours(size), *local, "retrain=end_to_end", "retrain.stages.end_to_end.batch=4"]


def with_generated(size: Setting) -> list[str]:
    """The same at as many calibration tokens (2 × 8 × 23 × 256, and 94 k), half of them written by the dense model."""
    half = ("calibration_domains.generated=184", "retrain.stages.end_to_end.tokens=94208")
    return [*end_to_end(size), *half]


def grouped(*overrides: str) -> Callable[[Setting], list[str]]:
    """Ours with other groups to begin with."""
    return lambda size: [*ours(size), *overrides]


TOY = ("budget=toy", "eval=default")
"""The embedded model's figures for every model: the bench's own options say how much."""
REFITTED = "pruning.compensation=least_squares"
METHODS = {
    "dense_retrained": Method("the dense model, retrained as ours is", unpruned),
    "flap": Method("FLAP, one expert", single("pruning=flap")),
    "flap_ls": Method("FLAP with least squares, one expert", single("pruning=flap", REFITTED)),
    "flap_ls_taught": Method(
        "the same, taught by the dense model as ours is", single("pruning=flap", REFITTED, retrain=())
    ),
    "wanda_sp": Method("Wanda-sp, one expert", single("pruning=wanda_sp")),
    "llm_pruner": Method("LLM-Pruner (Taylor), one expert", single("pruning=llm_pruner")),
    "random_split": Method(
        "random split (LLaMA-MoE)",
        mixture("moe=random_split", "pruning=flap", "pruning.compensation=none"),
    ),
    "random_split_ls": Method(
        "random split, refitted, fitted routers",
        mixture("moe=random_split", "pruning=flap", REFITTED, "moe.random_split.router_init=distilled"),
    ),
    "coactivation": Method(
        "co-activation split, shared channels (CMoE), fitted routers",
        mixture("moe=coactivation", "pruning=flap", "pruning.compensation=none"),
    ),
    "coactivation_ls": Method(
        "co-activation split, refitted, fitted routers", mixture("moe=coactivation", "pruning=flap", REFITTED)
    ),
    "upcycle": Method("sparse upcycling, refitted", mixture("moe=upcycle", "pruning=flap", REFITTED)),
    "paper": Method("DIVE, the paper's recipe", paper),
    "dive": Method("DIVE, ours", ours),
    "dive_end_to_end": Method("ours from a quarter of that text, the rest for all layers together", end_to_end),
    "dive_generated": Method("the same, half of all text written by the dense model", with_generated),
    "dive_untaught": Method("ours, retrained on the text alone", grouped(*TEXT_ALONE)),
    "dive_distilled": Method(
        "ours, retrained on the dense model's predictions alone", grouped("retrain.stages.retrain.teacher.logits=1")
    ),
    "dive_mined": Method("ours from mined groups", grouped("affinity=mined")),
    "dive_random": Method("ours from random groups", grouped("affinity=random")),
    "dive_importance": Method("ours from groups by importance", grouped("affinity=importance")),
    "dive_plain": Method("mined groups, not refined", grouped("moe=plain")),
    "dive_plain_shared": Method(
        "mined groups, not refined, half of every expert shared", grouped("moe=plain", "moe.plain.shared=0.5")
    ),
    "dive_plain_random": Method("random groups, not refined", grouped("moe=plain", "affinity=random")),
    "dive_plain_importance": Method("groups by importance, not refined", grouped("moe=plain", "affinity=importance")),
    "dive_plain_kmeans": Method(
        "k-means on tokens, not refined",
        grouped("moe.refined.rounds=0", "moe.refined.sequential=false", "moe.refined.steps=0"),
    ),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One run."""

    method: str
    setting: str
    tokens: int
    seed: int
    fold: int
    learning_rate: float | None
    """Of the stages that train experts; the configuration's own if null."""
    dev: bool = False
    """Measured on text cut from the training text, to choose the learning rate."""

    def name(self, overrides: Sequence[str]) -> str:
        """Of its file: what it is, and a hash of the exact configuration."""
        digest = hashlib.sha256(json.dumps(list(overrides)).encode()).hexdigest()[:10]
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        fold = f"-fold{self.fold}{'-dev' if self.dev else ''}"
        return f"{self.method}-{self.setting}-{self.tokens}-seed{self.seed}{fold}{rate}-{digest}"


# ---------------------------------------------------------------------------------------------------------- one cell


def stage_overrides(config: Config, *, tokens: int, learning_rate: float | None, train: str) -> list[str]:
    """Divide the budget over the stages in the shares of their configured tokens, in whole steps; the last takes the rest.

    Raises:
        UserError: the budget does not give every stage a step.
    """
    before = [name for name, stage in config.retrain.stages.items() if stage.text is StageText.calibration]
    stages = [(name, stage) for name, stage in config.retrain.stages.items() if name not in before]
    alike = [f"retrain.stages.{name}.train.experts={train}" for name in before]
    if tokens == 0:
        return [*alike, *(f"~retrain.stages.{name}" for name, _ in stages)] if before else ["retrain=none"]
    if not stages:
        raise UserError(f"--tokens {tokens}: no stage reads the retraining corpus")
    total = sum(stage.tokens for _, stage in stages)
    left, found = tokens, alike
    for number, (name, stage) in enumerate(stages):
        step = stage.batch * config.retrain.length
        share = left if number == len(stages) - 1 else max(round(tokens * stage.tokens / total / step), 1) * step
        if share < step:
            raise UserError(f"--tokens {tokens}: stage {name} is left with less than a step of {step} tokens")
        left -= share
        found.append(f"retrain.stages.{name}.tokens={share // step * step}")
        if stage.train.experts is not Freezing.frozen:
            if learning_rate is not None:
                found.append(f"retrain.stages.{name}.learning_rate={learning_rate:g}")
            found.append(f"retrain.stages.{name}.train.experts={train}")
    return found


def run_cell(overrides: Sequence[str], directory: Path) -> dict[str, Any]:
    """Run the pipeline, and keep of its results what the tables need.

    Raises:
        UserError: as the pipeline.
    """
    from dive.pipeline import train
    from dive.results import to_json

    config = composed(overrides)
    directory.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (directory / "log.txt").open("w") as log, contextlib.redirect_stdout(log), logged(log):
        results = train(config, directory, list(overrides))
    assert results.dense is not None, "the dense model is measured"
    assert results.routing is not None, "the experts are measured"
    for name in ("checkpoint", "checkpoint_with_expert_bias", "plots", "csv"):
        shutil.rmtree(directory / name, ignore_errors=True)  # the model can be made again from the store
    return {
        "overrides": list(overrides),
        "perplexity": results.stages[-1].perplexity,
        "dense": results.dense.perplexity,
        "sets": results.evaluation.sets,
        "tokens": results.tokens,
        "parameters": to_json(results.parameters),
        "load_max_over_mean": max(results.routing.load_max_over_mean or [0.0]),
        "load_entropy": statistics.fmean(results.routing.load_entropy or [0.0]),
        "calibration_tokens": results.calibration_tokens,
        "seconds": time.monotonic() - start,
    }


@contextlib.contextmanager
def logged(stream: TextIO) -> Iterator[None]:
    """What the package says goes to ``stream`` and nowhere else."""
    logger, handler = logging.getLogger("dive"), logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


class Bench:
    """The cells of one command, found in ``<out>/cells`` or run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out = Path(arguments.out)
        self.failed = 0
        model = (
            ["model=tiny"]
            if arguments.model is None
            else ["model=local", f"model.path={quoted(arguments.model)}", *TOY]
        )
        store = arguments.store or str(self.out / "store")
        self.common = [*model, "logger=csv", f"store={quoted(store)}", f"eval.windows={arguments.windows}"]
        if arguments.samples is not None:
            self.common.append(f"calibration_domains.samples={arguments.samples}")
        self.common += arguments.override
        self.source = source_overrides(arguments.domains)
        self.data = composed([*self.common, *self.source])
        self.folds = held_out(domain_names(self.data.calibration_domains), arguments.held_out, arguments.folds)

    def text(self, cell: Cell) -> list[str]:
        """Overrides that say what a cell calibrates, trains and is measured on."""
        out = self.folds[cell.fold]
        kept = [name for name in domain_names(self.data.calibration_domains) if name not in out]
        chosen = [f"calibration_domains.domains=[{','.join(quoted(name) for name in kept)}]"]
        if cell.dev:
            return [*source_overrides(str(dev_texts(self.data, kept, self.out / f"dev-{cell.fold}"))), *chosen]
        return [*self.source, *(chosen if out else []), *held_out_sets(self.data, out)]

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell; none if it is refused, which is said on stderr."""
        arguments = self.arguments
        method = METHODS[cell.method].overrides(Setting.parse(cell.setting))
        overrides = [*self.common, *self.text(cell), f"seed={cell.seed}", *method]  # the method has the last word
        try:
            stages = stage_overrides(
                composed(overrides),
                tokens=cell.tokens,
                learning_rate=cell.learning_rate,
                train=arguments.train,
            )
            # `retrain=none` has no stages that an override could speak of.
            named = [o for o in overrides if stages != ["retrain=none"] or "retrain." not in o] + stages
            file = self.out / "cells" / f"{cell.name(named)}.json"
            if file.is_file():
                return dict(json.loads(file.read_text()))
            if arguments.report_only:
                return None
            print(f"{file.stem} ...", end=" ", flush=True, file=sys.stderr)
            found = {"cell": asdict(cell), **run_cell(named, self.out / "runs" / file.stem)}
        except UserError as error:
            print(f"{cell.method} {cell.setting}: {error}", file=sys.stderr)
            self.failed += 1
            return None
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
        print(f"perplexity {found['perplexity']['mean']:.2f}, {found['seconds']:.0f} s", file=sys.stderr)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Run everything, seed after seed, so that an early stop leaves a whole table of few seeds."""
        arguments = self.arguments
        kinds = [(s, m, t) for s in arguments.settings for m in arguments.methods for t in arguments.tokens]
        found: dict[tuple[str, str, int], list[dict[str, Any]]] = {kind: [] for kind in kinds}
        rates = {kind: self.learning_rate(*kind) for kind in kinds}
        for seed in arguments.seeds:
            for fold in range(len(self.folds)):
                for setting, method, tokens in kinds:
                    rate = rates[setting, method, tokens]
                    result = self.get(Cell(method, setting, tokens, seed, fold, rate))
                    if result is not None:
                        found[setting, method, tokens].append(result)
        return summarise(found)

    def learning_rate(self, setting: str, method: str, tokens: int) -> float | None:
        """The one of ``--learning-rates`` with the smallest perplexity on the development text (first seed, first fold)."""
        rates: list[float] = self.arguments.learning_rates
        if tokens == 0 or len(rates) < 2:
            return rates[0] if rates and tokens else None
        tried = {}
        for rate in rates:
            result = self.get(Cell(method, setting, tokens, self.arguments.seeds[0], 0, rate, dev=True))
            if result is not None:
                tried[rate] = result["perplexity"]["mean"]
        return min(tried, key=lambda rate: tried[rate]) if tried else rates[0]


# -------------------------------------------------------------------------------------------------------------- texts


def quoted(text: str) -> str:
    """A string in Hydra's override grammar."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def source_overrides(domains: str | None) -> list[str]:
    """The embedded domains, or those of a directory."""
    if domains is None:
        return ["calibration_domains=embedded"]
    return ["calibration_domains=local", f"calibration_domains.path={quoted(domains)}"]


def held_out(names: Sequence[str], count: int, folds: int) -> list[list[str]]:
    """The domains that each fold leaves out: none, or ``count`` others each time.

    Raises:
        UserError: there are not enough domains.
    """
    if count == 0:
        return [[]]
    if count * folds > len(names) or count >= len(names):
        raise UserError(f"--held-out {count} --folds {folds}: there are {len(names)} domains only")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(names))
    return [sorted(names[i] for i in order[fold * count : (fold + 1) * count]) for fold in range(folds)]


def held_out_sets(config: Config, names: Sequence[str]) -> list[str]:
    """Measure on the test text of the domains left out, cut like every domain's."""
    if not names:
        return []
    domains = config.calibration_domains
    local = domains.source is TextSource.local
    directories = domain_directories(domains.path or "", list(names), where="--domains") if local else {}
    entries = []
    for position, name in enumerate(names):
        key = name if re.fullmatch(r"[A-Za-z_]\w*", name) else f"held_out_{position}"  # all that Hydra takes for a key
        path = str(split_file(directories[name], "test", where="--domains").resolve()) if local else name
        entries.append(
            f"{key}:{{source:{domains.source.value},path:{quoted(path)},text_field:{quoted(domains.text_field)},"
            f"lengths:[{config.eval.lengths[0]}],separator:null}}"
        )
    return ["+eval.sets={" + ",".join(entries) + "}"]


def dev_texts(config: Config, names: Sequence[str], root: Path) -> Path:
    """Write ``<domain>/{train,test}.jsonl`` in which the test text is cut from the training text; returns ``root``.

    One piece in :data:`DEV_SHARE` goes to ``test``, unless it stands in what is left as well. The real test text is not read
    here.
    """
    if (root / "written").is_file():
        return root

    def normal(text: str) -> str:
        return " ".join(text.casefold().split())

    parts = {
        d.name: pieces(d.train) for d in load_domains(config.calibration_domains, seed=config.seed) if d.name in names
    }
    train = {name: [p for i, p in enumerate(texts) if i % DEV_SHARE] for name, texts in parts.items()}
    seen = {normal(piece) for texts in train.values() for piece in texts}
    for name, texts in parts.items():
        splits = {"train": train[name], "test": [p for p in texts[::DEV_SHARE] if normal(p) not in seen]}
        (root / name).mkdir(parents=True, exist_ok=True)
        for split, documents in splits.items():
            lines = (json.dumps({"text": text}) + "\n" for text in documents)
            (root / name / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    (root / "written").touch()
    return root


# ------------------------------------------------------------------------------------------------------------- tables


def summarise(found: Mapping[tuple[str, str, int], Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each setting, method and number of tokens: means and standard deviations over seeds and folds.

    ``gap`` is ln(perplexity) − ln(dense perplexity). The dense model is a row of its own.
    """
    rows: list[dict[str, Any]] = []
    for (setting, method, tokens), results in found.items():
        if not results:
            continue
        if not any(row["setting"] == setting for row in rows):
            dense = [
                {
                    **r,
                    "perplexity": r["dense"],
                    "parameters": {**r["parameters"], **dict.fromkeys(PARTS, r["parameters"]["dense"])},
                }
                for r in results
            ]
            rows.append(
                summary(setting, "dense", "dense", 0, dense) | {"load_max_over_mean": None, "load_entropy": None}
            )
        rows.append(summary(setting, method, METHODS[method].title, tokens, results))
    return rows


PARTS = ("total", "active")


def summary(setting: str, method: str, title: str, tokens: int, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"setting": setting, "method": method, "title": title, "tokens": tokens, "runs": len(results)}
    own = [r["perplexity"]["mean"] for r in results]
    row |= spread("perplexity", own)
    row |= spread("gap", [math.log(p / r["dense"]["mean"]) for p, r in zip(own, results, strict=True)])
    if all(r["sets"] for r in results):
        pairs = [[log_mean(r[which], r["sets"]) for which in ("perplexity", "dense")] for r in results]
        row |= spread("held_out_perplexity", [math.exp(after) for after, _ in pairs])
        row |= spread("held_out_gap", [after - before for after, before in pairs])
    row |= {part: results[0]["parameters"][part] for part in PARTS}
    row["trained_tokens"] = results[0]["tokens"]
    row["calibration_tokens"] = results[0]["calibration_tokens"]
    row["load_max_over_mean"] = max(r["load_max_over_mean"] for r in results)
    row["load_entropy"] = statistics.fmean(r["load_entropy"] for r in results)
    row["learning_rate"] = results[0]["cell"]["learning_rate"] if "cell" in results[0] else None
    row["seconds"] = statistics.fmean(r["seconds"] for r in results)
    return row


def log_mean(perplexities: Mapping[str, float], keys: Sequence[str]) -> float:
    """Mean logarithm of the perplexities under ``keys``."""
    return statistics.fmean(math.log(perplexities[key]) for key in keys)


def spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation of the sample; no deviation of a single value."""
    return {name: statistics.fmean(values), f"{name}_sd": statistics.stdev(values) if len(values) > 1 else None}


def count(tokens: int) -> str:
    """500000 as 0.5 M."""
    return "0" if tokens == 0 else f"{tokens / 1e6:g} M"


def table(rows: Sequence[Mapping[str, Any]], value: str) -> list[str]:
    """Markdown: a method a line, tokens as columns."""
    tokens = sorted({row["tokens"] for row in rows})
    lines = ["| method | parameters | active | " + " | ".join(f"{count(t)} tokens" for t in tokens) + " |"]
    lines.append("| --- | --- | --- |" + " --- |" * len(tokens))
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = {row["tokens"]: row for row in rows if row["method"] == method}
        first = next(iter(mine.values()))
        digits = 3 if value.endswith("gap") else 2
        cells = [number(mine[t][value], mine[t][f"{value}_sd"], digits) if t in mine else "" for t in tokens]
        sizes = " | ".join(f"{first[part] / 1e6:.3g} M" for part in PARTS)
        lines.append(f"| {first['title']} | {sizes} | " + " | ".join(cells) + " |")
    return lines


def number(mean: float, deviation: float | None, digits: int) -> str:
    """``38.21 ± 0.07``."""
    return f"{mean:.{digits}f}" if deviation is None else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def routing_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: balance of the experts after the most tokens."""
    most = max(row["tokens"] for row in rows)
    lines = ["| method | largest load over mean load, worst layer | entropy of the load in nats, mean over layers |"]
    lines.append("| --- | --- | --- |")
    for row in rows:
        if row["tokens"] == most and row["load_entropy"] is not None and row["total"] > row["active"]:
            lines.append(f"| {row['title']} | {row['load_max_over_mean']:.2f} | {row['load_entropy']:.2f} |")
    return lines


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """All tables."""
    lines: list[str] = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == setting]
        runs = max(row["runs"] for row in mine)
        many = f"{runs} runs a cell, or as many as are done"
        lines += ["", f"## {setting}", "", f"Perplexity, geometric mean over the domains ({many}):", ""]
        lines += table(mine, "perplexity")
        lines += ["", "Gap to the dense model, ln(perplexity) − ln(dense perplexity):", "", *table(mine, "gap")]
        outside = [row for row in mine if "held_out_perplexity" in row]
        if outside:
            lines += ["", "Perplexity on domains left out of calibration and retraining:", ""]
            lines += table(outside, "held_out_perplexity")
            lines += ["", "Gap on them:", "", *table(outside, "held_out_gap")]
        lines += ["", "Routing on the test texts:", "", *routing_table(mine)]
    return "\n".join(lines).strip() + "\n"


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Perplexity against retraining tokens, a panel a setting."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure = Figure(figsize=(6.4 * len(settings), 5.0), layout="constrained")
    axes = figure.subplots(1, len(settings), squeeze=False)[0]
    for panel, setting in zip(axes, settings, strict=True):
        mine = [row for row in rows if row["setting"] == setting]
        for index, method in enumerate(dict.fromkeys(row["method"] for row in mine)):
            line = [row for row in mine if row["method"] == method]
            if method == "dense":
                panel.axhline(line[0]["perplexity"], color="black", linestyle=":", label="dense")
                continue
            panel.errorbar(
                [row["tokens"] for row in line],
                [row["perplexity"] for row in line],
                yerr=[row["perplexity_sd"] or 0.0 for row in line],
                marker="o",
                capsize=3,
                linewidth=2.5 if method == "dive" else 1.2,
                color=f"C{index % 10}",
                linestyle="--" if index > 10 else "-",
                label=line[0]["title"],
            )
        smallest = min((row["tokens"] for row in mine if row["tokens"]), default=1)
        panel.set_xscale("symlog", linthresh=smallest)
        ticks = sorted({row["tokens"] for row in mine})
        panel.set_xticks(ticks, [count(tokens) for tokens in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_title(Setting.parse(setting).title)
        panel.set_xlabel("retraining tokens")
        panel.set_ylabel("perplexity, geometric mean over domains")
        panel.grid(alpha=0.3)
    axes[-1].legend(fontsize=7)
    figure.savefig(file, dpi=150)


def write(rows: Sequence[Mapping[str, Any]], out: Path, command: Sequence[str]) -> str:
    """Write the tables and the plot; returns the markdown."""
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(rows)
    (out / "quality.md").write_text(text, encoding="utf-8")
    write_json(out / "quality.json", {"command": ["python", "benchmarks/quality.py", *command], "rows": list(rows)})
    with (out / "quality.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, out / "quality.png")
    return text


# ------------------------------------------------------------------------------------------------------- command line


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Parser of a list with commas."""

    def parse(text: str) -> list[Any]:
        return [kind(item) for item in text.split(",") if item]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


QUICK = {
    "tokens": [0, 50_000],
    "seeds": [1],
    "settings": ["ratio0.75-top1"],
    "methods": [
        "flap",
        "flap_ls",
        "wanda_sp",
        "llm_pruner",
        "random_split_ls",
        "coactivation_ls",
        "upcycle",
        "paper",
        "dive",
    ],
    "windows": 6,
}


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--model", metavar="DIR", help="dense model; the embedded one by default")
    add("--domains", metavar="DIR", help="<domain>/{train,test}.jsonl|txt|parquet; the embedded domains by default")
    add("--methods", type=listed(str), default=list(METHODS), help=f"of {','.join(METHODS)}")
    add("--settings", type=listed(str), default=["ratio0.75-top1"], help="e.g. ratio0.75-top1,ratio0.875-top2")
    add(
        "--tokens", type=listed(lambda t: int(float(t))), default=[0, 100_000, 500_000, 2_000_000], help="of retraining"
    )
    add("--seeds", type=listed(int), default=[1, 2, 3])
    add("--held-out", type=int, default=0, help="domains left out of calibration and retraining, and measured apart")
    add("--folds", type=int, default=1, help="with --held-out: so many runs, each leaving out other domains")
    add(
        "--learning-rates",
        type=listed(float),
        default=[],
        help="one for all, or several to choose from on training text",
    )
    add("--train", choices=("lora", "full"), default="full", help="how experts are retrained, in every method")
    add("--samples", type=int, help="calibration sequences a domain")
    add("--windows", type=int, default=12, help="evaluation windows a domain")
    add("--override", action="append", default=[], metavar="KEY=VALUE", help="for every run; may be given again")
    add("--out", default="outputs/quality")
    add("--store", help="shared artifacts; <out>/store by default")
    add("--quick", action="store_true", help="one seed, few tokens: " + json.dumps(QUICK))
    add("--report-only", action="store_true", help="tables of what is there; run nothing")
    return found


def main(command: Sequence[str]) -> int:
    """Run what is missing and print the tables; returns the exit code."""
    arguments = parser().parse_args(command)
    if arguments.quick:
        given = parser().parse_args([a for a in command if a != "--quick"])
        for name, value in QUICK.items():
            if getattr(given, name) == parser().get_default(name):
                setattr(arguments, name, value)
    try:
        check(arguments)
        bench = Bench(arguments)
        rows = bench.rows()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not rows:
        print("error: no cell has a result", file=sys.stderr)
        return 1
    print(write(rows, bench.out, command))
    return 1 if bench.failed else 0


def check(arguments: argparse.Namespace) -> None:
    """
    Raises:
        UserError: a method or setting is unknown, or a list is empty.
    """
    unknown = [name for name in arguments.methods if name not in METHODS]
    if unknown:
        raise UserError(f"--methods: {unknown} not among {list(METHODS)}")
    for name in ("methods", "settings", "tokens", "seeds"):
        if not getattr(arguments, name):
            raise UserError(f"--{name} is empty")
    for setting in arguments.settings:
        Setting.parse(setting)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
