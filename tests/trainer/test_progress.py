"""What a terminal and a log show while a stage trains: a real fit, and a screen made of what it wrote."""

import io
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from dive import progress
from dive.config import TrainerConfig
from dive.progress import Progress, ticking, track
from dive.trainer.build import build_trainer
from dive.trainer.progress import StageProgress

STEPS, TOKENS = 8, 20_000
log = logging.getLogger("tests.trainer")


class Terminal(io.StringIO):
    """A stream that says of itself that it is a terminal."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that are left to see, after every cursor movement that rich makes."""
        lines, row = [""], 0
        for found in re.finditer(r"\x1b\[(\d*)([A-Za-z])|\x1b\[\?\d+[hl]|[\r\n]|[^\x1b\r\n]+", self.getvalue()):
            if found[0] == "\n":
                row += 1
                lines += [""] * (row == len(lines))
            elif found[2] == "A":
                row -= int(found[1] or 1)
            elif found[2] == "K":
                lines[row] = ""
            elif found[0] != "\r" and found[0][0] != "\x1b":
                lines[row] += found[0]
        return [line.rstrip() for line in lines if line.strip()]


class Line(lightning.LightningModule):
    """A line that learns; it says so at every step, and takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.recorded: list[float] = []
        self.pending = 0.0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        time.sleep(0.03)
        log.info("noted %d", self.trainer.global_step)
        loss = (self.layer(batch) - 2.0).square().mean()
        self.pending = float(loss.detach())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.recorded.append(self.pending)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(2 * STEPS, 1), batch_size=1)  # type: ignore[arg-type]

    def loss(self) -> float | None:
        return self.recorded[-1] if self.recorded else None


def fit(directory: Path, *, console: Console | None, steps: int = STEPS, resume: Path | None = None) -> Line:
    """Two passes a step, a checkpoint after the fourth."""
    module = Line()
    trainer = build_trainer(
        TrainerConfig(),
        layer_class=torch.nn.Linear,
        steps=steps,
        accumulation=2,
        checkpoints=directory,
        checkpoint_every=4,
        loggers=[],
        callbacks=[StageProgress("retrain", steps=STEPS, tokens=TOKENS, loss=module.loss, console=console)],
    )
    trainer.fit(module, ckpt_path=resume, weights_only=True)
    return module


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A terminal that the log goes to as well, as in a run."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    logging.root.addHandler(handler)
    assert logging.lastResort is not None
    logging.getLogger("a library").addHandler(logging.lastResort)  # as transformers does
    logging.root.setLevel(logging.INFO)
    yield stream
    assert handler.stream is stream
    logging.root.removeHandler(handler)
    logging.getLogger("a library").removeHandler(logging.lastResort)


def console(stream: io.StringIO, width: int = 100) -> Console:
    return Console(file=stream, force_terminal=True, width=width, color_system=None)


def test_the_bar_shows_step_rate_loss_and_time_left(terminal: Terminal, tmp_path: Path) -> None:
    module = fit(tmp_path, console=console(terminal))
    drawn = terminal.getvalue()
    assert re.search(r"retrain .*━.* [1-7]/8 +[\d.]+ k tokens/s, loss \d\.\d{3}, \d:\d\d left", drawn)
    rates = [float(rate) for rate in re.findall(r"([\d.]+) k tokens/s", drawn)]
    assert all(0 < rate < TOKENS / 0.06 / 1000 for rate in rates)  # two passes of at least 0.03 s
    assert f"loss {module.recorded[-1]:.3f}" in drawn
    assert f"loss {module.recorded[-1] * 2:.3f}" not in drawn


def test_log_lines_stand_above_the_bar_and_the_bar_goes(terminal: Terminal, tmp_path: Path) -> None:
    fit(tmp_path, console=console(terminal))
    lines = terminal.screen()
    assert [line for line in lines if "noted" in line] == [f"noted {step}" for step in range(STEPS) for _ in "12"]
    assert re.fullmatch(
        r"retrain: step 8/8 after [\d.]+ s, [\d.]+ k tokens/s, loss [\d.]+, perplexity [\d.]+", lines[-1]
    )
    assert not any("━" in line for line in lines)


def test_a_resumed_stage_begins_at_its_step(terminal: Terminal, tmp_path: Path) -> None:
    fit(tmp_path, console=None, steps=4)
    terminal.truncate(0)
    fit(tmp_path / "again", console=console(terminal), resume=tmp_path / "step=4.ckpt")
    shown = [int(step) for step in re.findall(r"(\d)/8 ", terminal.getvalue())]
    assert shown[0] == 4
    assert shown[-1] == 8


def test_the_bar_goes_where_the_run_is_stopped(terminal: Terminal, tmp_path: Path) -> None:
    class Stopped(StageProgress):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if trainer.global_step == 3:
                raise RuntimeError("enough")

    module = Line()
    trainer = build_trainer(
        TrainerConfig(),
        layer_class=torch.nn.Linear,
        steps=STEPS,
        accumulation=1,
        checkpoints=tmp_path,
        checkpoint_every=99,
        loggers=[],
        callbacks=[Stopped("retrain", steps=STEPS, tokens=1, loss=module.loss, console=console(terminal))],
    )
    with pytest.raises(RuntimeError, match="enough"):
        trainer.fit(module)
    log.info("after it")
    assert terminal.screen()[-1] == "after it"
    assert not any("━" in line for line in terminal.screen())


def test_without_a_terminal_it_says_a_line_now_and_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0.1)
    caplog.set_level(logging.INFO)
    fit(tmp_path, console=None)
    said = [message for message in caplog.messages if message.startswith("retrain")]
    line = r"retrain: [1-7]/8, [\d.]+ k tokens/s, loss \d\.\d{3}, [\d.]+ s left"
    assert 2 <= len(said) - 1 <= 7
    assert all(re.fullmatch(line, message) for message in said[:-1]), said
    assert said[-1].startswith("retrain: step 8/8 after ")


def test_long_log_lines_are_whole_and_a_narrow_bar_is_one_line(terminal: Terminal) -> None:
    with Progress("evaluating reconstructed", 4000, "window", console=console(terminal, width=60)) as shown:
        for done in range(3):
            time.sleep(0.02)
            shown.reached(done, "loss 2.345")
            log.info("a path %s", "x" * 100)
    assert terminal.screen() == [f"a path {'x' * 100}"] * 3


def test_a_bar_leaves_room_for_what_the_terminal_writes_at_ctrl_c(terminal: Terminal) -> None:
    with Progress("retrain", 4, console=console(terminal, width=60)) as shown:
        time.sleep(0.05)
        shown.reached(2, "loss 2.345")
        time.sleep(0.3)
        drawn = terminal.screen()
    assert len(drawn) == 1
    assert 40 < len(drawn[0] + "^C") < 60


def test_tracked_work_has_the_same_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "terminal", lambda: console(terminal))
    for number in track(range(5), "building 8 experts", "layer"):
        time.sleep(0.05)
        log.info("layer %d", number)
    assert re.search(r"building 8 experts .*━.* \d/5 +[\d.]+ (layer/s|s/layer), \d:\d\d left", terminal.getvalue())
    assert terminal.screen() == [f"layer {number}" for number in range(5)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (7, "0:07"), (247, "4:07"), (3599.4, "59:59"), (3847, "1:04 h"), (90000, "25:00 h")],
)
def test_time_left_as_it_ticks(seconds: float, text: str) -> None:
    assert ticking(seconds) == text


def test_a_bar_within_a_bar_leaves_the_log_whole(terminal: Terminal) -> None:
    with Progress("outer", 2, console=console(terminal)), Progress("inner", 2, console=console(terminal)) as inner:
        inner.reached(1)
        log.info("from within")
    log.info("after")
    assert [line for line in terminal.screen() if "━" not in line] == ["from within", "after"]


def test_slow_work_counts_the_seconds_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    work = Progress("retrain", 100, "tokens", size=1)
    for done in range(5):
        work.reached(done)
        now += 90.0
    now -= 90.0
    assert work.speed() == "1:30/tokens"
    assert work.left() == pytest.approx(96 * 90)
    now += 30.0  # the clock goes on between steps
    assert work.figures(ticking) == "1:30/tokens, 2:23 h left"
