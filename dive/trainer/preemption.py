"""A checkpoint of the running stage when the cluster asks for the machine."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from dive import preemption


class SaveWhenPreempted(Callback):
    """Saves a checkpoint after the optimiser step in which any process got SIGTERM or SIGUSR1, and ends the run.

    Raises:
        Preempted: out of ``Trainer.fit``, in every process after the same step.
    """

    def __init__(self, checkpoints: Path) -> None:
        """
        Args:
            checkpoints: directory of the running stage's checkpoints.
        """
        self.checkpoints = checkpoints
        self.step = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        # Lightning's own handler of SIGTERM calls a collective from wherever the process happens to be, and its handler
        # of SIGUSR1 under SLURM puts the job back into the queue by itself.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.step = trainer.global_step
        preemption.postpone()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            return  # between the passes of one step
        self.step = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(preemption.asked(), all=False):
            return
        path = self.checkpoints / f"step={self.step}.ckpt"
        trainer.save_checkpoint(path)  # collective
        if trainer.is_global_zero:
            for file in self.checkpoints.glob("*.ckpt"):
                if file != path:
                    file.unlink()
        raise preemption.Preempted
