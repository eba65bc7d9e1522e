"""The LightningModule that retrains a reconstructed Mixture-of-Experts.

Shapes: B sequences, T tokens each, E experts, L layers.
"""

import logging
import math
import time
from functools import partial
from typing import Any

import lightning
import torch
from lightning.fabric.loggers.logger import Logger
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics import Metric
from transformers import PreTrainedModel

from dive.config import RetrainConfig, StageConfig
from dive.errors import UserError
from dive.model.families import decoder_layers
from dive.moe.plug import routers
from dive.progress import PLAIN_INTERVAL
from dive.retrain.corpus import BlockRange, Blocks
from dive.retrain.schedule import learning_rate_share
from dive.retrain.teacher import hidden_distance, logit_distance

log = logging.getLogger(__name__)


class TokenPerplexity(Metric):
    """exp of the mean negative log-likelihood a token, from sums of it: exact over batches and processes."""

    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, mean_nll: Tensor, tokens: int) -> None:
        """Add ``tokens`` tokens with a mean negative log-likelihood of ``mean_nll`` nats."""
        self.nll += mean_nll.double() * tokens
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Perplexity."""
        return (self.nll / self.tokens).exp()


class MoERetraining(lightning.LightningModule):
    """One stage of retraining: next-token cross-entropy, alone as in the paper or with what the stage adds to it."""

    def __init__(
        self,
        model: PreTrainedModel,
        stage: StageConfig,
        retrain: RetrainConfig,
        blocks: Blocks,
        *,
        name: str,
        key: str,
        first_block: int,
        accumulation: int,
        seed: int,
        shard: bool,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        """
        Args:
            model: reconstructed, its routers plugged, its freezing policy applied.
            blocks: the corpus.
            name: of the stage.
            key: identifies the stage's inputs; a checkpoint of another key is refused.
            first_block: where in the corpus the stage begins.
            accumulation: forward passes per optimiser step on each device.
            seed: of dropout and router noise.
            shard: apply FSDP2 to the layers when the strategy is set up.
            teacher: the dense model, where the stage learns from it.
        """
        super().__init__()
        self.model = model
        self.stage = stage
        self.retrain = retrain
        self.blocks = blocks
        self.name = name
        self.key = key
        self.first_block = first_block
        self.accumulation = accumulation
        self.seed = seed
        self.shard = shard
        self.teacher = [teacher] if teacher is not None else []  # in a list: no submodule, not saved, not sharded
        self.steps = optimiser_steps(stage, retrain.length)
        self.trained_names = {f"model.{n}" for n, p in model.named_parameters() if p.requires_grad}
        self.perplexity = TokenPerplexity()
        self.curve: list[dict[str, float]] = []
        self.strict_loading = False  # a checkpoint holds the trained parameters, not the frozen base
        self._before = 0.0  # seconds of training before an interruption
        self._started = self._since = time.monotonic()
        self._since_step = 0
        self._said = self._since

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
        self._since, self._since_step = time.monotonic(), self.trainer.global_step  # restored by now, if resumed
        for values in self.curve:  # of before an interruption: the loggers of this process have not seen them
            for logger in self.loggers:
                log_values(logger, self.name, values)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids = batch["input_ids"]
        # Dropout and noise depend on the position in the data alone, so a resumed run repeats them.
        torch.manual_seed((self.seed * 1_000_003 + int(batch["index"][0])) % 2**63)
        for router in routers(self.model):
            router.exponent = 1.0 - self.trainer.global_step / self.steps
        wants_hidden = self.stage.teacher.hidden > 0
        output = self.model(input_ids=ids, use_cache=False, output_hidden_states=wants_hidden)
        logits = output.logits[:, :-1].flatten(0, 1).float()
        text = functional.cross_entropy(logits, ids[:, 1:].flatten())
        loss = text
        for teacher in self.teacher:
            loss = self._learn_from(teacher, ids, loss, logits, output.hidden_states)
        for router in routers(self.model):
            if router.penalty is not None:
                loss = loss + router.penalty
                router.penalty = None
        finite = bool(torch.isfinite(loss))
        if not self.trainer.strategy.reduce_boolean_decision(finite):  # all stop, or the others would wait in vain
            raise UserError(
                f"retrain.stages.{self.name}: the loss is {float(loss.detach())} at step {self.trainer.global_step}; lower "
                f"retrain.stages.{self.name}.learning_rate, or set trainer.gradient_clip"
            )
        self.perplexity.update(text.detach(), ids[:, 1:].numel())
        return loss

    def _learn_from(
        self, teacher: PreTrainedModel, ids: Tensor, loss: Tensor, logits: Tensor, hidden: tuple[Tensor, ...] | None
    ) -> Tensor:
        """The loss with the teacher's part: logits (B · (T − 1), V), hidden states of every layer where they are wanted."""
        settings = self.stage.teacher
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False, output_hidden_states=settings.hidden > 0)
        if settings.logits:
            distance = logit_distance(
                logits,
                wanted.logits[:, :-1].flatten(0, 1),
                temperature=settings.temperature,
                top_k=settings.top_k,
            )
            loss = (1.0 - settings.logits) * loss + settings.logits * distance
        if hidden is not None:
            loss = loss + settings.hidden * hidden_distance(hidden[1:], wanted.hidden_states[1:])
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._record_if_due()

    def _record_if_due(self) -> None:
        step = self.trainer.global_step
        if step == self._since_step or (step % self.retrain.log_every and step != self.steps):
            return
        self._record(step)

    def _record(self, step: int) -> None:
        now = time.monotonic()
        perplexity = float(self.perplexity.compute())
        self.perplexity.reset()
        rate = (step - self._since_step) * self.stage.batch * self.retrain.length / (now - self._since)
        values = {
            "step": float(step),
            "tokens": float(step * self.stage.batch * self.retrain.length),
            "loss": math.log(perplexity),
            "perplexity": perplexity,
            "learning_rate": float(self.optimizers().param_groups[0]["lr"]),  # type: ignore[union-attr]
            "tokens_per_second": rate,
        }
        for number, router in enumerate(routers(self.model)):
            load, entropy = router.take_observations()
            load = self.trainer.strategy.reduce(load, reduce_op="mean")
            entropy = self.trainer.strategy.reduce(entropy, reduce_op="mean")
            values[f"router_entropy/layer_{number:02d}"] = float(entropy)
            values |= {f"expert_load/layer_{number:02d}/expert_{e}": float(share) for e, share in enumerate(load)}
        self.curve.append(values)
        for logger in self.loggers:
            log_values(logger, self.name, values)
        self._since, self._since_step = now, step
        if self.trainer.is_global_zero and (now - self._said > PLAIN_INTERVAL or step == self.steps):
            left = (self.steps - step) * self.stage.batch * self.retrain.length / rate
            log.info(
                "%s: step %d/%d, loss %.3f, perplexity %.2f, %.0f tokens/s, %.0f s left",
                *(self.name, step, self.steps, values["loss"], perplexity, rate, left),
            )
            self._said = now

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
        checkpoint["dive"] = {"stage": self.name, "key": self.key, "curve": self.curve, "seconds": self.seconds}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve = list(checkpoint["dive"]["curve"])
        self._before = float(checkpoint["dive"]["seconds"])

    @property
    def seconds(self) -> float:
        """Training time of the stage so far, interrupted runs included up to their last checkpoint."""
        return self._before + time.monotonic() - self._started


def log_values(logger: Logger, stage: str, values: dict[str, float]) -> None:
    """Log one point of a stage's curve under ``<stage>/<name>``; W&B has the points before it where it goes on in a run."""
    if isinstance(logger, WandbLogger) and values["step"] <= logger.experiment.summary.get(f"{stage}/step", -1):
        return
    logger.log_metrics({f"{stage}/{name}": value for name, value in values.items()}, step=int(values["step"]))


def optimiser_steps(stage: StageConfig, length: int) -> int:
    """Optimiser steps of a stage: its tokens, rounded up to whole steps."""
    return math.ceil(stage.tokens / (stage.batch * length))
