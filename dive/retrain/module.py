"""The LightningModule that retrains a reconstructed Mixture-of-Experts.

Shapes: B sequences, T tokens each, E experts, L layers.
"""

import time
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from dive.errors import UserError
from dive.logger.log import log_point
from dive.model.families import decoder_layers, sparse_layers
from dive.moe.plug import routers
from dive.retrain.blocks import BlockRange, Blocks
from dive.retrain.curve import Curve
from dive.retrain.loss import next_token_loss
from dive.retrain.schedule import learning_rate_share
from dive.retrain.teacher import hidden_distance
from dive.retrain.training import Training


class MoERetraining(lightning.LightningModule):
    """One stage of retraining: next-token cross-entropy, alone as in the paper or with what the stage adds to it."""

    def __init__(
        self,
        model: PreTrainedModel,
        training: Training,
        blocks: Blocks,
        *,
        key: str,
        first_block: int,
        accumulation: int,
        log_every: int,
        shard: bool,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        """
        Args:
            model: reconstructed, its routers plugged, its freezing policy applied.
            training: what decides the stage's numbers.
            blocks: of the corpus, by their numbers.
            key: identifies the stage's inputs; a checkpoint of another key is refused.
            first_block: where in the corpus the stage begins.
            accumulation: forward passes per optimiser step on each device.
            log_every: optimiser steps between logged values.
            shard: apply FSDP2 to the layers when the strategy is set up.
            teacher: the dense model, where the stage learns from it.
        """
        super().__init__()
        self.model = model
        self.recipe = training
        self.stage = training.stage
        self.name = training.name
        self.blocks = blocks
        self.key = key
        self.first_block = first_block
        self.accumulation = accumulation
        self.log_every = log_every
        self.shard = shard
        self.teacher = [teacher] if teacher is not None else []  # in a list: no submodule, not saved, not sharded
        self.steps = training.steps
        self.trained_names = {f"model.{n}" for n, p in model.named_parameters() if p.requires_grad}
        self.curve = Curve(layers=sparse_layers(model.config))
        self.text_loss = MeanMetric(sync_on_compute=False, nan_strategy="disable").set_dtype(torch.float64)
        """Of the passes of the step under way; reduced over the processes with the rest of what is recorded."""
        self._learning_rate = 0.0
        self.strict_loading = False  # a checkpoint holds the trained parameters, not the frozen base
        self._before = 0.0  # seconds of training before an interruption
        self._started = self._since = time.monotonic()

    def configure_model(self) -> None:
        """Shard every decoder layer, then the rest (FSDP2)."""
        if not self.shard:
            return
        from torch.distributed.fsdp import fully_shard

        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for layer in decoder_layers(self.model):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.shard = False  # Lightning calls this hook again

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(
            trained, lr=self.stage.learning_rate, betas=(0.9, 0.999), weight_decay=self.stage.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser,
            partial(
                learning_rate_share,
                steps=self.steps,
                schedule=self.stage.schedule,
                warmup=self.stage.warmup,
                floor=self.stage.floor,
            ),
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The stage's blocks from the current optimiser step on."""
        world = self.trainer.world_size
        data = BlockRange(
            self.blocks,
            start=self.first_block + self.trainer.global_step * self.stage.batch,
            stop=self.first_block + self.steps * self.stage.batch,
            rank=self.trainer.global_rank,
            world=world,
        )
        return DataLoader(data, batch_size=self.stage.batch // (self.accumulation * world))

    def on_fit_start(self) -> None:
        for router in routers(self.model):
            router.mode = self.stage.mode
            router.temperature = self.stage.temperature
            router.gate = self.stage.gate
            router.balance, router.max_load = self.stage.balance, self.stage.max_load
            router.z_loss = self.stage.z_loss
        for teacher in self.teacher:
            teacher.to(self.device)
        self.model.train()
        self._started = time.monotonic()

    def on_train_start(self) -> None:
        self._since = time.monotonic()
        for values in self.points():  # of before an interruption: the loggers of this process have not seen them
            for logger in self.loggers:
                log_point(logger, self.name, values)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids = batch["input_ids"]
        # Dropout and noise depend on the position in the data alone, so a resumed run repeats them.
        torch.manual_seed((self.recipe.seed * 1_000_003 + int(batch["index"][0])) % 2**63)
        plugged = routers(self.model)
        for router in plugged:
            router.exponent = 1.0 - self.trainer.global_step / self.steps
            router.recording = True
        wants_hidden = self.stage.teacher.hidden > 0
        output = self.model(input_ids=ids, use_cache=False, output_hidden_states=wants_hidden)
        loss, text = self._loss(ids, output.logits, output.hidden_states)
        for router in plugged:
            router.recording = False
            penalty = router.take_penalty()
            if penalty is not None:
                loss = loss + penalty
        finite = bool(torch.isfinite(loss))
        if not self.trainer.strategy.reduce_boolean_decision(finite):  # all stop, or the others would wait in vain
            raise UserError(
                f"retrain.stages.{self.name}: the loss is {float(loss.detach())} at step {self.trainer.global_step}; lower "
                f"retrain.stages.{self.name}.learning_rate, or set trainer.gradient_clip"
            )
        self.text_loss.update(text.detach())
        return loss

    def _loss(self, ids: Tensor, logits: Tensor, hidden: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
        """(loss, the text's part of it); of logits (B, T, V), which are written over, and hidden states of every layer."""
        settings, wanted = self.stage.teacher, None
        for teacher in self.teacher:
            with torch.no_grad():
                wanted = teacher(input_ids=ids, use_cache=False, output_hidden_states=hidden is not None)
        theirs = wanted.logits if wanted is not None and settings.logits else None
        loss, text = next_token_loss(logits, ids, theirs, settings)
        if hidden is not None and wanted is not None:
            loss = loss + settings.hidden * hidden_distance(hidden[1:], wanted.hidden_states[1:])
        return loss, text

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # Lightning keeps the gradients through the next forward pass

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._learning_rate = float(optimizer.param_groups[0]["lr"])  # after the step it is the next one's

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._record_if_due()

    def _record_if_due(self) -> None:
        step = self.trainer.global_step
        if step == len(self.curve):
            return  # between the passes of one step, or recorded already
        self._record()
        if step % self.log_every == 0 or step == self.steps:
            self._log(step)

    def _record(self) -> None:
        """Add the step that was just taken to the curve; collective."""
        observed = [router.take_observations() for router in routers(self.model)]
        load, entropy = (torch.stack(column).double() for column in zip(*observed, strict=True))
        loss = self.text_loss.compute()
        packed = self.trainer.strategy.reduce(torch.cat([loss[None], entropy, load.flatten()]), reduce_op="mean")
        values = packed.cpu()
        now = time.monotonic()
        self.curve.loss.append(float(values[0]))
        self.curve.learning_rate.append(self._learning_rate)
        self.curve.seconds.append(now - self._since)
        self.curve.entropy.append(values[1 : 1 + len(load)].float())
        self.curve.load.append(values[1 + len(load) :].reshape(load.shape).float())
        self.text_loss.reset()
        self._since = now

    def _log(self, step: int) -> None:
        tokens = self.recipe.step_tokens
        values = self.curve.point(self.log_every, tokens=tokens)
        for logger in self.loggers:
            log_point(logger, self.name, values)

    def recent_loss(self) -> float | None:
        """Mean over the latest ``retrain.log_every`` steps, nats a token; none before the first."""
        latest = self.curve.loss[-self.log_every :]
        return sum(latest) / len(latest) if latest else None

    def points(self) -> list[dict[str, float]]:
        """The curve so far, as it is logged."""
        tokens = self.recipe.step_tokens
        return self.curve.points(self.log_every, tokens=tokens, steps=self.steps)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all processes; Lightning leaves that to the model under FSDP."""
        if gradient_clip_val is not None and isinstance(self.trainer.strategy, FSDPStrategy):
            sharded: Any = self.trainer.strategy.model
            sharded.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._record_if_due()  # callbacks save before on_train_batch_end is called here
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in self.trained_names}
        curve = self.curve.tensors()
        checkpoint["dive"] = {"stage": self.name, "key": self.key, "curve": curve, "seconds": self.seconds}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve = Curve.of(checkpoint["dive"]["curve"])
        self._before = float(checkpoint["dive"]["seconds"])

    @property
    def seconds(self) -> float:
        """Training time of the stage so far, interrupted runs included up to their last checkpoint."""
        return self._before + time.monotonic() - self._started
