"""How far a stage of retraining is: the bar of :mod:`dive.progress`, or its lines."""

import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning
from lightning.pytorch.callbacks import Callback

from dive.progress import Progress
from dive.units import clock

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)


class StageProgress(Callback):
    """Shows the optimiser steps of a stage in the first process; a resumed stage goes on at its step."""

    def __init__(
        self,
        name: str,
        *,
        steps: int,
        tokens: int,
        loss: Callable[[], float | None],
        console: "Console | None" = None,
    ) -> None:
        """
        Args:
            name: of the stage.
            steps: of the whole stage.
            tokens: of a step, over all devices.
            loss: gives the loss to show, in nats a token; none before the first step.
            console: where the bar is drawn; the terminal, if there is one, for none.
        """
        self.name = name
        self.steps = steps
        self.tokens = tokens
        self.loss = loss
        self.console = console
        self.progress: Progress | None = None
        self.started = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.started = time.monotonic()
        self.progress = Progress(
            self.name,
            self.steps,
            "tokens",
            size=self.tokens,
            done=trainer.global_step,  # restored by now
            console=self.console,
        ).__enter__()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # At the end of a batch callbacks come before the module, which has not recorded the loss yet.
        self._show(trainer.global_step)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.progress is None:
            return
        self._show(trainer.global_step)
        rate, loss = self.progress.speed(), self.loss()
        self._close()
        took = clock(time.monotonic() - self.started)
        ends = "" if loss is None else f", loss {loss:.3f}, perplexity {math.exp(min(loss, 700.0)):.2f}"
        log.info("%s: step %d/%d after %s, %s%s", self.name, trainer.global_step, self.steps, took, rate, ends)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _show(self, step: int) -> None:
        if self.progress is None:
            return
        loss = self.loss()
        self.progress.reached(step, "" if loss is None else f"loss {loss:.3f}")

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.__exit__()
        self.progress = None
