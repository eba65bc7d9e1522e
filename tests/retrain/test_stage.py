"""Interrupted, resumed and distributed retraining end with the weights of an undisturbed run in one process."""

import csv
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.workplace import Workplace

STOCHASTIC = ("retrain.lora.dropout=0.1", "retrain.noise=0.05", "moe.top_k=2", "trainer.accumulation=2")
"""Everything that draws random numbers in training."""
FITTED = "moe.refined.steps=0"
"""Local steps make the rounding of several processes' sums large, as any rounding on six hundred tokens; tests/test_ranks.py
has a few of them."""
TEACHER = ("retrain.stages.retrain.teacher.logits=0.5", "retrain.stages.retrain.teacher.hidden=0.1")
ROUTERS = (
    "retrain.stages.retrain.gate=straight_through",
    "retrain.stages.retrain.balance=0.01",
    "retrain.stages.retrain.z_loss=0.001",
)


def exported(workplace: Workplace, name: str) -> dict[str, torch.Tensor]:
    """Weights that a run exported."""
    return load_file(workplace.root / name / "checkpoint/model.safetensors")


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for a run; its output."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    return output


def kill_after_checkpoint(process: "subprocess.Popen[str]", store: Path, step: int, signal_: int) -> None:
    """Send a signal once the second stage has written a checkpoint of at least this step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        steps = [int(file.stem.rpartition("=")[2]) for file in store.glob("partial/*/step=*.ckpt")]
        if list(store.glob("retrained/*/manifest.json")) and any(s >= step for s in steps):
            process.send_signal(signal_)
            process.communicate(timeout=60)
            return
        time.sleep(0.005)
    raise AssertionError("the run ended before it could be stopped")


def logged(directory: Path) -> list[tuple[str, str]]:
    """(step, loss) of the second stage in the file of its curve."""
    with (directory / "csv/retrain/metrics.csv").open(newline="") as stream:
        return [(row["retrain/step"], row["retrain/loss"]) for row in csv.DictReader(stream)]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(workplace: Workplace, tmp_path: Path) -> None:
    long = ("retrain.stages.retrain.tokens=30720", *STOCHASTIC, *TEACHER, *ROUTERS)
    finish(workplace.start("undisturbed", f"store={tmp_path / 'a'}", *long))
    kill_after_checkpoint(
        workplace.start("killed", f"store={tmp_path / 'b'}", *long), tmp_path / "b", 6, signal.SIGKILL
    )
    assert not (workplace.root / "killed/checkpoint").exists()
    output = finish(workplace.start("killed", f"store={tmp_path / 'b'}", *long))
    assert "going on from" in output
    expected, found = exported(workplace, "undisturbed"), exported(workplace, "killed")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not list((tmp_path / "b/partial").iterdir())
    assert logged(workplace.root / "undisturbed") == logged(workplace.root / "killed")


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(workplace: Workplace, tmp_path: Path) -> None:
    # Where tests run by `&` it is ignored, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = workplace.start("stopped", f"store={tmp_path}", "retrain.stages.retrain.tokens=300000")
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("partial/*/step=*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output[-3000:]
    assert "The same command goes on" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_the_weights_of_one(workplace: Workplace, strategy: str) -> None:
    same = ("moe.top_k=2", FITTED, "trainer.accumulation=2", TEACHER[0], ROUTERS[0])
    finish(workplace.start("one", f"store={workplace.root / 'one-store'}", *same))
    output = finish(
        workplace.start(
            strategy,
            f"store={workplace.root / strategy}-store",
            f"trainer={strategy}",
            "trainer.accelerator=cpu",
            "trainer.devices=2",
            "trainer.precision=32-true",
            "trainer.gradient_checkpointing=true",
            *same,
        )
    )
    assert output.count("Perplexity (geometric mean") == 1  # the second process is silent
    expected, found = exported(workplace, "one"), exported(workplace, strategy)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_checkpoint_of_two_processes_is_resumed_by_one(workplace: Workplace, tmp_path: Path, strategy: str) -> None:
    long = ("retrain.stages.retrain.tokens=102400", "retrain.checkpoint_every=20", FITTED)
    finish(workplace.start(f"{strategy}-undisturbed", f"store={tmp_path / 'a'}", *long))
    two = (f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    process = workplace.start(f"{strategy}-two", f"store={tmp_path / 'b'}", *long, *two)
    kill_after_checkpoint(process, tmp_path / "b", 20, signal.SIGTERM)
    output = finish(workplace.start(f"{strategy}-one", f"store={tmp_path / 'b'}", *long))
    assert "retrain: going on from" in output
    expected, found = exported(workplace, f"{strategy}-undisturbed"), exported(workplace, f"{strategy}-one")
    for name in expected:  # 400 steps of Adam let the rounding of two processes' sums grow
        assert (found[name] - expected[name]).norm() <= 0.01 * expected[name].norm(), name
    curves = [logged(workplace.root / f"{strategy}-{run}") for run in ("undisturbed", "one")]
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
    losses = [[float(loss) for _, loss in curve] for curve in curves]
    # The point that was under way holds the first process's part of the steps before the signal.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
def test_mixed_precision_trains_in_float32_and_exports_in_bfloat16(
    workplace: Workplace, tmp_path: Path, strategy: str
) -> None:
    hardware = () if strategy == "single" else ("trainer=fsdp2", "trainer.accelerator=cpu", "trainer.devices=2")
    short = ("retrain.stages.router.tokens=512", "retrain.stages.retrain.tokens=512")
    mixed = ("model.dtype=bfloat16", "trainer.precision=bf16-mixed", *hardware, *short)
    finish(workplace.start(f"mixed-{strategy}", f"store={tmp_path}", *mixed))
    for file in tmp_path.glob("retrained/*/trained.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    assert {tensor.dtype for tensor in exported(workplace, f"mixed-{strategy}").values()} == {torch.bfloat16}


def keep_partial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a stage went on from stay once it is stored."""
    import shutil

    from dive import store

    class Keeping:
        @staticmethod
        def rmtree(path: Path, **settings: bool) -> None:
            if path.parent.name != "partial":
                shutil.rmtree(path, **settings)

    monkeypatch.setattr(store, "shutil", Keeping)


def test_checkpoints_hold_what_is_trained_alone(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_partial(monkeypatch)
    workplace.run("kept", f"store={tmp_path}")
    for file in tmp_path.glob("partial/*/*.ckpt"):
        names = torch.load(file, weights_only=True)["state_dict"]
        assert names
        assert all(".gate." in n or "norm" in n or ".lora_" in n for n in names)


def test_resuming_from_a_path(workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dive.errors import UserError

    keep_partial(monkeypatch)
    workplace.run("origin", f"store={tmp_path / 'a'}", "~retrain.stages.router")
    (checkpoint,) = (tmp_path / "a").glob("partial/*/*.ckpt")
    with pytest.raises(UserError, match="no such checkpoint"):
        workplace.run("missing", f"store={tmp_path / 'b'}", "~retrain.stages.router", "retrain.resume=nowhere.ckpt")
    (tmp_path / "bad.ckpt").write_text("not a checkpoint")
    with pytest.raises(UserError, match="is not a checkpoint"):
        workplace.run(
            *("bad", f"store={tmp_path / 'b'}", "~retrain.stages.router", f"retrain.resume={tmp_path / 'bad.ckpt'}")
        )
    workplace.run("path", f"store={tmp_path / 'b'}", "~retrain.stages.router", f"retrain.resume='{checkpoint}'")
    expected, found = exported(workplace, "origin"), exported(workplace, "path")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(UserError, match="another configuration or other data"):
        workplace.run(
            *("other", f"store={tmp_path / 'c'}", "~retrain.stages.router", f"retrain.resume='{checkpoint}'"),
            "retrain.stages.retrain.learning_rate=1e-5",
        )


def test_calibration_text_is_counted_as_such_and_no_block_of_it_is_read_twice(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dive.results import read_results
    from dive.retrain import stage

    began: list[int] = []

    class Spied(stage.MoERetraining):
        def __init__(self, *args: Any, first_block: int, **settings: Any) -> None:
            began.append(first_block)
            super().__init__(*args, first_block=first_block, **settings)

    monkeypatch.setattr(stage, "MoERetraining", Spied)
    pass_ = "retrain.stages.router.text=calibration"
    found = workplace.run("counted", f"store={tmp_path / 'a'}", pass_)
    assert [(s["tokens"], s["calibration"]) for s in found["stages"]][-2:] == [(512, True), (3072, False)]
    results = read_results(workplace.root / "counted")
    assert results.tokens == 3072
    assert results.calibration_tokens == 4 * 6 * 32 + 512
    assert began == [0, 512 // 32]  # the corpus is the domains' text too
    page = (workplace.root / "counted/report.html").read_text()
    assert "512 calibration</td>" in page
    assert "Calibration read 1.28\xa0k tokens" in page

    (tmp_path / "own.txt").write_text("the cat sat on the mat and slept all day long " * 60)
    own = f"retrain.corpus.path={tmp_path / 'own.txt'}"
    other = workplace.run("own", f"store={tmp_path / 'a'}", pass_, own)
    assert began == [0, 16, 0]  # the router stage is found in the store; another corpus begins at its beginning
    assert other["stages"][-2]["reused"]
    same = workplace.run("same", f"store={tmp_path / 'a'}")  # the domains' text, whatever it counts as
    assert [s["reused"] for s in same["stages"]] == [True] * 5
    assert not same["stages"][-2]["calibration"]
