"""Keys that cannot lie: every option changes the key of a step, or stands here among those that change no number.

A run rests whole in a store. The same run with one option changed must meet a step that is not there.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dive.run
from dive.errors import UserError
from dive.pipeline import train
from dive.results import flatten
from dive.store import Store, plain
from tests.conftest import Build
from tests.workplace import Workplace, write_domains, write_task

pytestmark = pytest.mark.slow

HOW = {
    "budget": "how much: what takes its figures has a key",
    "calibration_domains.batch": "sequences of a pass",
    "eval.batch": "windows of a pass",
    "eval.allow_overlap": "what is refused",
    "eval.generated_tokens": "texts to be read; they are no part of any number",
    "eval.generations": "texts to be read; they are no part of any number",
    "logger": "who is told",
    "model.architecture": "what is compared with the model's own config.json",
    "model.device": "where it is computed",
    "model.export_dtype": "the export is written anew by every run",
    "model.load": "where the weights are meanwhile",
    "model.name": "what the model is called",
    "model.revision": "the commit is in the model's fingerprint; a directory has none",
    "plan": "an estimate",
    "retrain.checkpoint_every": "when a checkpoint is saved",
    "retrain.log_every": "points of a curve that is recorded step by step",
    "retrain.resume": "where a stage goes on from",
    "store": "where artifacts are",
    "trainer.accelerator": "where it is computed",
    "trainer.accumulation": "passes of a step; a key where the loss depends on them",
    "trainer.devices": "processes; a key where the loss depends on them",
    "trainer.experts": "whose code computes the experts",
    "trainer.gradient_checkpointing": "what is computed twice",
    "trainer.pass_tokens": "passes of a step; a key where the loss depends on them",
    "trainer.num_nodes": "processes; a key where the loss depends on them",
    "trainer.strategy": "what is where",
    "retrain.stages.router.accumulation": "passes of a step; a key where the loss depends on them",
    "retrain.stages.retrain.accumulation": "passes of a step; a key where the loss depends on them",
}
"""Options that say how, and what they are. The same numbers come out, but for rounding."""
CONTENT = {
    "calibration_domains.corpus",
    "calibration_domains.hub",
    "calibration_domains.path",
    "calibration_domains.source",
    "calibration_domains.text_field",
    "eval.sets",
    "eval.task_path",
    "eval.task_settings",
    "model.path",
    "retrain.corpus",
    "retrain.stages.router.text",
    "retrain.stages.retrain.text",
}
"""Where text and questions come from: keys hold these themselves."""

SHORT = ("retrain.stages.router.tokens=512", "retrain.stages.retrain.tokens=512")
LEARNS = ("retrain.stages.retrain.teacher.logits=0.5", "retrain.stages.retrain.teacher.hidden=1")
BASES: dict[str, tuple[str, ...]] = {
    "refined": (
        *("affinity=mined", "moe.refined.steps=4", "retrain.lora.dropout=0.1", "retrain.stages.retrain.balance=0.1"),
        *(*LEARNS, "retrain.stages.retrain.schedule=cosine", "retrain.stages.retrain.train.router=full"),
    ),
    "clusters": ("affinity=default", "moe.refined.steps=4", "~retrain.stages.router"),
    "routers": (
        *("affinity=random", "retrain.stages.router.mode=sparse", "retrain.stages.router.balance=0.1"),
        *("retrain.stages.router.teacher.logits=0.5", "retrain.stages.router.schedule=cosine"),
    ),
    "plain": (
        "moe=plain",
        "moe.experts=2",
        "pruning.metric=wifv",
        "moe.plain.shared=0.25",
        "retrain.noise=0.01",
        "retrain.stages.retrain.mode=dense",
    ),
    "split": ("moe=random_split", "moe.experts=2", "moe.random_split.router_init=distilled", "retrain.noise=0.01"),
    "together": ("moe=coactivation", "moe.experts=2"),
    "copies": ("moe=upcycle", "moe.experts=2"),
}
"""Runs in which, between them, every option has a say."""
OTHER: dict[str, Any] = {
    "affinity.grouping": "random",
    "affinity.groups": None,  # is another grouping
    "affinity.linkage": "single",
    "affinity.mapped": 8,
    "affinity.measure": "importance",
    "calibration_domains.domains": "[cats,code,news]",
    "calibration_domains.group_samples": 5,
    "calibration_domains.repeat": None,  # what a text that is too short becomes
    "eval.add_bos_token": True,
    "eval.lengths": "[16]",
    "eval.task_limit": 3,
    "eval.tasks": "[]",
    "eval.windows": 2,
    "model.dtype": "bfloat16",
    "model.twin": "qwen2_moe",
    "moe.dense_layers": "[1]",
    "moe.gates": "probabilities",
    "moe.refined.start": "random",
    "moe.shared_expert": 0.67,
    "moe.top_k": 2,
    "pruning.compensation": "none",
    "pruning.metric": "magnitude",
    "pruning.obs_block": 2,
    "pruning.ridge": 0.1,
    "pruning.width_multiple": 16,
    "retrain.storage": "indexed",
    "trainer.gradient_clip": 0.1,
    "trainer.precision": "bf16-mixed",
    **{f"retrain.stages.{stage}.mode": mode for stage, mode in (("router", "sparse"), ("retrain", "dense"))},
    **{f"retrain.stages.{stage}.gate": "straight_through" for stage in ("router", "retrain")},
    **{f"retrain.stages.{stage}.schedule": "constant" for stage in ("router", "retrain")},
    **{f"retrain.stages.{stage}.teacher.top_k": 3 for stage in ("router", "retrain")},
    **{f"retrain.stages.{stage}.batch": 8 for stage in ("router", "retrain")},
    **{f"retrain.stages.{stage}.tokens": 1024 for stage in ("router", "retrain")},
}
"""Another value, where the next number, the opposite or another name will not do."""
ENTAILS = {
    **{f"moe.{name}": ("model.twin=qwen2_moe",) for name in ("dense_layers", "gates", "shared_expert")},
    "pruning.compensation": ("pruning.metric=wifv",),
    "pruning.metric": ("pruning.compensation=least_squares",),
    "retrain.storage": ("retrain.stages.retrain.train.experts=lora",),
    "moe.refined.start": ("affinity=default",),
    "retrain.stages.router.train.router": ("retrain.stages.router.train.norms=full",),
    **{
        f"retrain.stages.{stage}.train.{part}": (f"retrain.stages.{stage}.train.{other}=full",)
        for stage in ("router", "retrain")
        for part, other in (("embeddings", "head"), ("head", "embeddings"))  # one tensor here
    },
}
"""What must change with an option for a run to compose."""


class Missing(Exception):
    """A step is not in the store."""


class Arrived(Exception):
    """Every step was in the store."""


def another(path: str, value: Any) -> Any:
    """Another value of an option; none where it has none of its own."""
    if path in OTHER:
        return OTHER[path]
    if path.endswith("router_init"):
        return "random" if value == "distilled" else "distilled"
    if path.endswith("max_load"):
        return value + 1.0
    if ".train." in path:
        return "full" if value == "frozen" else "frozen"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value * 0.5 if value else 0.25


@pytest.fixture(scope="module")
def place(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The workplace with a task, and all base runs in its store."""
    root = tmp_path_factory.mktemp("keys")
    tasks = write_task(root / "tasks", "cats", questions=6)
    settings = [*workplace.settings, *SHORT, f"eval.task_path={tasks}", "eval.tasks=[cats]", "eval.windows=1"]
    found = Workplace(root, workplace.root / "dense", workplace.root / "domains")
    found.settings = [s for s in settings if s != "affinity=mined"]
    for name, overrides in BASES.items():
        found.run(name, *overrides)
    return found


def leaves(place: Workplace) -> dict[str, list[tuple[str, Any]]]:
    """{option: (base run that has it, its value there)} of all options that have a value in some base run."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for name, overrides in BASES.items():
        for path, value in flatten(plain(place.compose(*overrides))).items():
            found.setdefault(path, []).append((name, value))
    return found


def without(overrides: tuple[str, ...], changes: tuple[str, ...]) -> tuple[str, ...]:
    """The overrides that the changes do not replace: Hydra takes each group once."""
    replaced = {change.partition("=")[0] for change in changes}
    return tuple(override for override in overrides if override.partition("=")[0] not in replaced)


def meets_a_new_step(place: Workplace, base: str, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the run asks for something that the base run did not make."""

    def missing(self: Store, *arguments: object) -> None:
        raise Missing

    def arrived(*arguments: object, **others: object) -> None:
        raise Arrived

    monkeypatch.setattr(Store, "_put", missing)
    monkeypatch.setattr(dive.run, "export", arrived)
    config = place.compose(*without(BASES[base], changes), *changes)
    with pytest.raises((Missing, Arrived, UserError)) as met:  # more experts than domains, or the like
        train(config, place.root / "again", [])
    return met.type is Missing


def listed(path: str, names: Any) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def test_the_same_run_meets_no_new_step(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    for base in BASES:
        assert not meets_a_new_step(place, base, (), monkeypatch), base


def test_every_option_changes_a_key_or_says_how(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    unheard = []
    for path, places in leaves(place).items():
        if listed(path, HOW) or listed(path, CONTENT):
            continue
        given = [(base, another(path, value)) for base, value in places if value is not None or path in OTHER]
        changes = [(base, (*ENTAILS.get(path, ()), f"{path}={value}")) for base, value in given if value is not None]
        tried = [(base, change) for base, change in changes if composes(place, base, change)]
        if changes and not any(meets_a_new_step(place, base, change, monkeypatch) for base, change in tried):
            unheard.append(path)
    assert not unheard, unheard


def composes(place: Workplace, base: str, changes: tuple[str, ...]) -> bool:
    """Whether the change contradicts nothing else in this base run."""
    try:
        place.compose(*without(BASES[base], changes), *changes)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("change", ["model", "text", "questions", "corpus"])
def test_what_is_read_is_in_a_key_by_its_content(
    place: Workplace, build: Build, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides: dict[str, Callable[[], list[str]]] = {
        "model": lambda: [f"model.path={other_model(place, build, tmp_path)}"],
        "text": lambda: [f"calibration_domains.path={other_text(tmp_path)}"],
        "questions": lambda: [f"eval.task_path={write_task(tmp_path / 'tasks', 'cats', questions=6, seed=1)}"],
        "corpus": lambda: [f"retrain.corpus.path={other_text(tmp_path) / 'news' / 'train.jsonl'}"],
    }
    assert meets_a_new_step(place, "refined", tuple(overrides[change]()), monkeypatch)


def other_model(place: Workplace, build: Build, directory: Path) -> Path:
    build("llama-tied", seed=5).save_pretrained(directory / "dense")
    (path,) = (setting.partition("=")[2] for setting in place.settings if setting.startswith("model.path="))
    for found in Path(path).glob("tokenizer*"):
        (directory / "dense" / found.name).write_bytes(found.read_bytes())
    return directory / "dense"


def other_text(directory: Path) -> Path:
    domains = write_domains(directory / "domains")
    file = domains / "news" / "train.jsonl"
    file.write_text("\n".join(reversed(file.read_text().splitlines())) + "\n")
    return domains


def test_moved_text_is_the_same_text(place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = write_domains(tmp_path / "elsewhere")
    assert not meets_a_new_step(place, "refined", (f"calibration_domains.path={moved}",), monkeypatch)


def test_options_that_say_how_change_no_result(place: Workplace, tmp_path: Path) -> None:
    """All at once, in a store of its own."""
    settings = ("affinity=mined", "moe.refined.steps=4", "retrain.lora.dropout=0", *LEARNS)
    changes = (
        *("calibration_domains.batch=5", "eval.batch=2", "eval.allow_overlap=true", "logger=[csv,tensorboard]"),
        *("model.device=cpu", "model.name=another", "model.revision=null", "plan.enforce=false", "plan.disk=1e8"),
        *("retrain.checkpoint_every=1", "retrain.log_every=3", "retrain.resume=null", "trainer.accumulation=2"),
        *("trainer.gradient_checkpointing=true", "retrain.stages.retrain.accumulation=4", "trainer.experts=ours"),
    )
    found = [
        place.run(f"how-{n}", *settings, *more, f"store={tmp_path / str(n)}") for n, more in enumerate(((), changes))
    ]
    for one, other in zip(*(results["stages"] for results in found), strict=True):
        assert not one["reused"]
        assert not other["reused"]
        assert one["perplexity"]["mean"] == pytest.approx(other["perplexity"]["mean"], rel=1e-4)
    assert found[0]["groups"] == found[1]["groups"]
    weights = [load_file(Path(results["export"]) / "model.safetensors") for results in found]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4)
    assert (
        json.loads((place.root / "how-1" / "results.json").read_text())["run"]["config"]["model"]["name"] == "another"
    )
