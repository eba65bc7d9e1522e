"""What Lightning trains when the small dense model is made: random windows, next-token loss, a schedule."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from dive.config import Schedule
from dive.retrain.schedule import learning_rate_share


class Windows(IterableDataset[Tensor]):
    """An endless stream of batches of token ids, (batch, length).

    Each window is of a domain drawn by the root of its size, at a random offset: even draws would repeat a
    small domain too often. Batch ``i`` depends on the seed and ``i`` alone, so a resumed run sees the batches
    that an uninterrupted one would have seen.
    """

    def __init__(
        self, streams: Sequence[Tensor], *, batch: int, length: int, long: int, long_every: int, seed: int
    ) -> None:
        self.streams = list(streams)
        """Token ids of each domain, (tokens,)."""
        self.batch, self.length, self.seed = batch, length, seed
        self.long, self.long_every = long, long_every
        roots = np.sqrt([len(stream) for stream in self.streams])
        self.odds = roots / roots.sum()
        self.start = 0
        """Number of the first batch."""

    def __iter__(self) -> Iterator[Tensor]:
        for step in count(self.start):
            draw = np.random.default_rng((self.seed, step))
            is_long = step % self.long_every == self.long_every - 1
            length = self.long if is_long else self.length
            rows = max(1, self.batch * self.length // length)
            windows = []
            for domain in draw.choice(len(self.streams), size=rows, p=self.odds):
                stream = self.streams[domain]
                offset = int(draw.integers(len(stream) - length + 1))
                windows.append(stream[offset : offset + length])
            yield torch.stack(windows)


class Pretraining(LightningModule):
    """Next-token training of a causal language model."""

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Windows,
        *,
        steps: int,
        learning_rate: float,
        warmup: float,
        floor: float,
        weight_decay: float,
    ) -> None:
        super().__init__()
        self.model = model
        self.windows = windows
        self.steps, self.learning_rate, self.warmup, self.floor = steps, learning_rate, warmup, floor
        self.weight_decay = weight_decay
        self.seconds = 0.0
        """Spent in training, interrupted runs included."""
        self.first_losses: list[float] = []
        """Of the first 10 steps."""
        self.last_losses: deque[float] = deque(maxlen=50)
        """Of the last steps."""
        self.clock = 0.0

    def on_train_start(self) -> None:
        self.model.train()
        self.clock = time.perf_counter()

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        """Mean next-token loss in nats of ``ids``, (batch, length)."""
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        # Here and not at the batch's end, where a checkpoint is written before this module's hook is called.
        value = float(loss.detach())
        if len(self.first_losses) < 10:
            self.first_losses.append(value)
        self.last_losses.append(value)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        now = time.perf_counter()
        elapsed, self.clock = now - self.clock, now
        self.seconds += elapsed
        self.log_dict({"loss": self.last_losses[-1], "tokens_per_second": batch.numel() / elapsed})

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
            betas=(0.9, 0.99),  # a longer second memory than 0.95: the steps are small
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            partial(
                learning_rate_share,
                steps=self.steps,
                schedule=Schedule.cosine,
                warmup=self.warmup,
                floor=self.floor,
            ),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = {
            "seconds": self.seconds,
            "first_losses": self.first_losses,
            "last_losses": list(self.last_losses),
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.windows.start = int(checkpoint["global_step"])
        progress = checkpoint["progress"]
        self.seconds = progress["seconds"]
        self.first_losses = list(progress["first_losses"])
        self.last_losses.extend(progress["last_losses"])
