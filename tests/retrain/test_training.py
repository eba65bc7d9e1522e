"""Settings that cannot change a stage's numbers are not in its key; those that can are."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dive.config import Freezing
from dive.model.architecture import read_architecture
from dive.plan.stages import plan
from dive.retrain.training import Training, optimiser_steps
from dive.store import key_of
from tests.model.test_architecture import typed
from tests.workplace import Workplace

EXPERTS = "retrain.stages.retrain"
TEXT = (f"{EXPERTS}.teacher.logits=0", f"{EXPERTS}.teacher.hidden=0")


def key(*overrides: str) -> str:
    """Of the default's only stage."""
    return key_of("retrained", {"training": Training.of(typed("model=tiny", *overrides), "retrain")})


WITHOUT: dict[str, tuple[tuple[str, ...], str]] = {
    "log_every": ((), "retrain.log_every=1"),
    "checkpoint_every": ((), "retrain.checkpoint_every=7"),
    "max_load without balance": ((), f"{EXPERTS}.max_load=3"),
    "temperature in sparse mode": ((), f"{EXPERTS}.temperature=0.5"),
    "teacher.top_k without logits": ((f"{EXPERTS}.teacher.logits=0",), f"{EXPERTS}.teacher.top_k=5"),
    "teacher.temperature without logits": ((f"{EXPERTS}.teacher.logits=0",), f"{EXPERTS}.teacher.temperature=2"),
    "gate in dense mode": ((f"{EXPERTS}.mode=dense",), f"{EXPERTS}.gate=switch"),
    "balance in dense mode": ((f"{EXPERTS}.mode=dense",), f"{EXPERTS}.balance=0.1"),
    "floor of a constant rate": ((f"{EXPERTS}.schedule=constant",), f"{EXPERTS}.floor=0.5"),
    "lora.rank without lora": ((), "retrain.lora.rank=3"),
    "lora.alpha without lora": ((), "retrain.lora.alpha=3"),
    "lora.dropout without lora": ((), "retrain.lora.dropout=0.1"),
    "accumulation": ((), "trainer.accumulation=2"),
    "accumulation of the stage": ((), f"{EXPERTS}.accumulation=4"),
    "accumulation without lora": (("retrain.lora.dropout=0.1",), "trainer.accumulation=2"),
    "accumulation that says the same": (
        (f"{EXPERTS}.balance=1", "trainer.accumulation=2"),
        f"{EXPERTS}.accumulation=2",
    ),
    "processes": (("trainer=ddp",), "trainer.devices=2"),
    "tokens of the same steps": ((), f"{EXPERTS}.tokens=131071"),
    "resume": ((), "retrain.resume=null"),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_what_cannot_matter_is_left_out(case: str) -> None:
    settings, change = WITHOUT[case]
    assert key(*settings) == key(*settings, change)


LORA = (f"{EXPERTS}.train.experts=lora",)
WITH: dict[str, tuple[tuple[str, ...], str]] = {
    "max_load": ((f"{EXPERTS}.balance=1",), f"{EXPERTS}.max_load=3"),
    "balance": ((), f"{EXPERTS}.balance=0.1"),
    "temperature": ((f"{EXPERTS}.mode=dense",), f"{EXPERTS}.temperature=0.5"),
    "mode": ((), f"{EXPERTS}.mode=dense"),
    "gate": ((), f"{EXPERTS}.gate=switch"),
    "z_loss": ((), f"{EXPERTS}.z_loss=0.1"),
    "teacher.top_k": ((), f"{EXPERTS}.teacher.top_k=5"),
    "teacher.temperature": ((), f"{EXPERTS}.teacher.temperature=2"),
    "teacher.logits": ((), f"{EXPERTS}.teacher.logits=0"),
    "teacher.hidden": ((), f"{EXPERTS}.teacher.hidden=0"),
    "floor": ((), f"{EXPERTS}.floor=0.5"),
    "warmup": ((), f"{EXPERTS}.warmup=0.5"),
    "schedule": ((), f"{EXPERTS}.schedule=constant"),
    "learning_rate": ((), f"{EXPERTS}.learning_rate=1e-4"),
    "weight_decay": ((), f"{EXPERTS}.weight_decay=0.1"),
    "tokens": ((), f"{EXPERTS}.tokens=131073"),
    "batch": ((), f"{EXPERTS}.batch=4"),
    "length": ((), "retrain.length=128"),
    "train": ((), f"{EXPERTS}.train.attention=full"),
    "lora.rank": (LORA, "retrain.lora.rank=3"),
    "lora.alpha": (LORA, "retrain.lora.alpha=3"),
    "lora.dropout": (LORA, "retrain.lora.dropout=0.1"),
    "noise": ((), "retrain.noise=0.1"),
    "precision": ((), "trainer.precision=bf16-mixed"),
    "gradient_clip": ((), "trainer.gradient_clip=0.5"),
    "seed": ((), "seed=1"),
    "accumulation with dropout": ((*LORA, "retrain.lora.dropout=0.1"), "trainer.accumulation=2"),
    "accumulation with noise": (("retrain.noise=0.1",), "trainer.accumulation=2"),
    "accumulation with balance": ((f"{EXPERTS}.balance=0.1",), "trainer.accumulation=2"),
    "processes with balance": ((f"{EXPERTS}.balance=0.1", "trainer=ddp"), "trainer.devices=2"),
}


@pytest.mark.parametrize("case", WITH)
def test_what_matters_is_in_it(case: str) -> None:
    settings, change = WITH[case]
    assert key(*settings) != key(*settings, change)


def test_two_processes_share_sequences_out_otherwise_than_two_passes() -> None:
    balanced = (f"{EXPERTS}.balance=0.1", "trainer=ddp", "trainer.precision=32-true")
    passes = key(*balanced, "trainer.devices=1", "trainer.accumulation=2")
    assert passes != key(*balanced, "trainer.devices=2", "trainer.accumulation=1")


def test_adapters_of_an_earlier_stage_count() -> None:
    stages = ("retrain=two_stages", "retrain.stages.router.train.attention=lora", f"{EXPERTS}.train.experts=frozen")
    config, other = typed("model=tiny", *stages), typed("model=tiny", *stages, "retrain.lora.dropout=0.1")
    assert config.retrain.stages["retrain"].train.experts is Freezing.frozen
    assert Training.of(config, "retrain") != Training.of(other, "retrain")


def test_steps_are_rounded_up() -> None:
    stage = typed("model=tiny", f"{EXPERTS}.batch=4", f"{EXPERTS}.tokens=4097").retrain.stages["retrain"]
    assert optimiser_steps(stage, 256) == 5
    assert optimiser_steps(stage, 4097) == 1


def of_stage(results: dict[str, Any]) -> dict[str, Any]:
    """The last stage of a run."""
    stage: dict[str, Any] = results["stages"][-1]
    return stage


def logged(directory: Path) -> list[dict[str, str]]:
    with (directory / "csv/retrain/metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_stage_is_reused_and_logged_anew_at_another_interval(workplace: Workplace, tmp_path: Path) -> None:
    settings = (f"store={tmp_path}", "~retrain.stages.router", "eval.windows=1", f"{EXPERTS}.tokens=3072")
    settings += (f"{EXPERTS}.train.experts=frozen", f"{EXPERTS}.warmup=0.5")
    first = workplace.run("logged-by-two", *settings)
    again = workplace.run(
        *("logged-by-three", *settings, "retrain.log_every=3", "trainer.accumulation=2"),
        *("retrain.lora.dropout=0.1", f"{EXPERTS}.max_load=2", f"{EXPERTS}.teacher.top_k=3"),
    )
    assert not of_stage(first)["reused"]
    assert of_stage(again)["reused"]
    two, three = logged(workplace.root / "logged-by-two"), logged(workplace.root / "logged-by-three")
    assert [float(row["retrain/step"]) for row in two] == [2, 4, 6]
    assert [float(row["retrain/step"]) for row in three] == [3, 6]
    # Steps 1 to 6 weigh the same in both.
    means = [sum(float(row["retrain/loss"]) for row in rows) / len(rows) for rows in (two, three)]
    assert means[0] == pytest.approx(means[1], rel=1e-6)
    # Three steps of warming up; the second was taken with two thirds of the peak.
    peak = 3e-3
    assert float(two[0]["retrain/learning_rate"]) == pytest.approx(peak * 2 / 3)


def test_idle_routers_are_not_counted_as_trained(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (f"store={tmp_path}", "~retrain.stages.router", "eval.windows=1", "moe.top_k=1")
    results = workplace.run("idle", *settings)
    assert "router: no gradient: one expert a token, renormalised gate" in capsys.readouterr().out
    norms, adapters = 5 * 32, 2 * 2 * 3 * 8 * (32 + 24)
    assert results["parameters"]["trained"] == of_stage(results)["trained"] == norms + adapters
    assert planned(workplace, *settings) == (norms + adapters, norms + adapters)
    gate = f"{EXPERTS}.gate=straight_through"
    results = workplace.run("learning", *settings, gate)
    assert "no gradient" not in capsys.readouterr().out
    every = 2 * 2 * 32 + norms + adapters
    assert results["parameters"]["trained"] == of_stage(results)["trained"] == every
    assert planned(workplace, *settings, gate) == (every, every)


def planned(workplace: Workplace, *overrides: str) -> tuple[int, int]:
    """Trained parameters of the whole run and of the expert stage, as the plan has them."""
    model = json.loads((workplace.root / "dense/config.json").read_text())
    found = plan(workplace.compose(*overrides), read_architecture(model))
    return found.parameters["trained"], next(stage.trained for stage in found.stages if stage.name == "retrain")
