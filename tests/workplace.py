"""A small place to run whole experiments in: a dense model, its tokenizer and the texts of a few domains, made here."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dive.cli import composed
from dive.config import Config
from dive.pipeline import train
from dive.results import to_json
from dive.store import Store, identity

WORDS = {
    "sums": ["12", "+", "30", "=", "42", "7", "19", "adds", "up", "to"],
    "cats": ["the", "cat", "sat", "on", "mat", "and", "slept", "all", "day", "long"],
    "code": ["import", "torch", ";", "print", "(", ")", "return", "x", "def", "f"],
    "news": ["today", "rain", "fell", "in", "town", "while", "people", "went", "to", "work"],
}


def write_domains(root: Path) -> Path:
    """``<root>/<domain>/{train,test}.jsonl`` of random sentences, each domain with words of its own."""
    for number, (domain, words) in enumerate(WORDS.items()):
        draw = random.Random(number)
        (root / domain).mkdir(parents=True)
        for split, documents in (("train", 60), ("test", 20)):
            rows = [{"text": " ".join(draw.choices(words, k=40))} for _ in range(documents)]
            (root / domain / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def write_task(root: Path, name: str, *, questions: int = 24, seed: int = 0, yaml: str = "") -> Path:
    """``<root>/<name>.yaml``: which word comes next in a sentence of one domain, of four; 8 examples beside the questions."""
    draw = random.Random(seed)
    words = WORDS["cats"]
    root.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 8), ("test", questions)):
        rows = [
            {"start": " ".join(draw.choices(words, k=4)), "next": draw.sample(words, 4), "right": draw.randrange(4)}
            for _ in range(count)
        ]
        (root / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    train: {root}/{name}_train.jsonl\n    test: {root}/{name}_test.jsonl\n"
        "output_type: multiple_choice\ntraining_split: train\ntest_split: test\n"
        'doc_to_text: "{{start}}"\ndoc_to_choice: "{{next}}"\ndoc_to_target: right\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        f"  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}\n{yaml}"
    )
    return root


class Bench:
    """What a step needs of a run: a store."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)


@dataclass(frozen=True)
class Ready:
    """A model that is in memory already, as a recipe."""

    model: Any
    key: str = "ready"
    routed: bool = False

    def load(self) -> Any:
        """The model; whoever has none must not be asked."""
        assert self.model is not None, "nobody may load this model"
        return self.model


@identity.register
def _(value: Ready) -> str:
    return value.key


class Workplace:
    """Runs experiments on one dense model, in this process or in another."""

    def __init__(self, root: Path, model: Path, domains: Path) -> None:
        self.root = root
        self.settings = [
            "budget=toy",
            "eval=default",
            "trainer.accelerator=cpu",
            "trainer.precision=32-true",
            "model=local",
            "model.dtype=float32",
            f"model.path={model}",
            "calibration_domains=local",
            f"calibration_domains.path={domains}",
            "calibration_domains.samples=6",
            "calibration_domains.length=32",
            "affinity.samples=2",
            "pruning.ratio=0.5",
            "moe.experts=2",
            "affinity=mined",
            "moe.distillation.steps=20",
            "eval.lengths=[32]",
            "eval.windows=3",
            "retrain=two_stages",
            "retrain.length=32",
            "retrain.checkpoint_every=2",
            "retrain.log_every=2",
            "retrain.stages.router.tokens=512",
            "retrain.stages.retrain.tokens=3072",
            "logger=csv",
        ]

    def compose(self, *overrides: str) -> Config:
        """The typed configuration of these overrides, in a store of its own unless one is named."""
        return composed([*self.settings, f"store={self.root / 'store'}", *overrides])

    def run(self, name: str, *overrides: str) -> dict[str, Any]:
        """Run in this process; the outputs are in ``<root>/<name>``."""
        found: dict[str, Any] = to_json(train(self.compose(*overrides), self.root / name, list(overrides)))
        return found

    def command(self, name: str, *overrides: str) -> list[str]:
        """The command line of a run whose outputs are in ``<root>/<name>``."""
        directory = f"hydra.run.dir={self.root / name}"
        store = f"store={self.root / 'store'}"
        return [sys.executable, "-m", "dive.train", *self.settings, store, directory, *overrides]

    def start(self, name: str, *overrides: str) -> "subprocess.Popen[str]":
        """Run in another process."""
        return subprocess.Popen(
            self.command(name, *overrides),
            cwd=self.root,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def environment() -> dict[str, str]:
    """Of a child process: one thread, offline, and this package on the path wherever it runs."""
    package = str(Path(__file__).resolve().parents[1])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": package, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
