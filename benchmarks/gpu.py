"""Router and retraining stage of retraining on one device: tokens/s, share of the peak arithmetic (MFU), peak memory.

    python -m benchmarks.gpu                                               # TinyLlama's shape, DIVE 1/8 and 2/8, one CUDA GPU
    python -m benchmarks.gpu --micro-batch 8 trainer.gradient_checkpointing=true
    python -m benchmarks.gpu --device cpu --shape tiny --length 32         # that it runs

Weights (made in memory) and tokens are random; everything else is a run's own: configuration of `experiment=paper_1_8` and
`paper_2_8`, routers, freezing policy, training module and trainer. Any overrides of `dive.train` may follow. A stage takes a few
optimiser steps; the first are not counted. MFU counts the operations of `dive.plan` (matrix products and attention that the
stage's forward and backward pass need, without what gradient checkpointing computes again) against the device's peak in the
stage's precision, from `conf/plan` by the device's name, or --peak. Prints one table.
"""

import argparse
import resource
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lightning
import torch
from torch import Tensor, nn

from benchmarks.shapes import SHAPES, llama_config
from benchmarks.timing import machine
from dive.cli import composed
from dive.config import Config
from dive.errors import UserError
from dive.model.architecture import read_architecture
from dive.model.families import decoder_layers, empty_moe, moe_config
from dive.moe.implementation import use_experts
from dive.moe.plug import plug_routers
from dive.plan import flops
from dive.plan.parameters import Shapes, shapes
from dive.retrain.freezing import apply_policy
from dive.retrain.module import MoERetraining
from dive.retrain.training import Training
from dive.trainer.build import build_trainer, check_devices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = {"H100": "h100", "H200": "h100", "A100": "a100-80", "4090": "rtx4090"}
"""What a GPU's name holds: the entry of ``plan.devices`` with its peaks. An H200 computes as an H100 does."""


def configured(setting: str, options: argparse.Namespace) -> Config:
    """The paper's recipe for ``1/8`` or ``2/8``, on this device and in batches that fit.

    Raises:
        UserError: an override is unknown or contradicts another.
    """
    batch, steps = options.micro_batch * options.accumulation, options.warm_up + options.steps
    overrides = [f"experiment=paper_{setting.replace('/', '_')}", "~retrain.stages.further"]
    overrides += [f"trainer={options.device}".replace("cuda", "gpu"), f"trainer.accumulation={options.accumulation}"]
    overrides += [f"model.dtype={'bfloat16' if options.device == 'cuda' else 'float32'}", "pruning.compensation=none"]
    overrides += [f"retrain.length={options.length}", "retrain.log_every=1"]
    for stage in ("router", "retrain"):
        overrides += [f"retrain.stages.{stage}.batch={batch}"]
        overrides += [f"retrain.stages.{stage}.tokens={steps * batch * options.length}"]
    return composed([*overrides, *options.overrides]).settled(gpu=options.device == "cuda")


def random_moe(config: Config, s: Shapes, options: argparse.Namespace) -> "PreTrainedModel":
    """A Mixture-of-Experts of random weights on the device, its routers plugged."""
    dense = llama_config(options.shape)
    with torch.device(options.device):
        twin = moe_config(dense, width=s.width, experts=s.experts, top_k=s.top_k)
        assert config.model.dtype is not None, "settled by the device"
        model = empty_moe(twin, getattr(torch, config.model.dtype.value))
        torch.manual_seed(config.seed)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)
    model.requires_grad_(False)
    plug_routers(model, noise=config.retrain.noise)
    return model


REPEATED = 8
"""Blocks of the text, which come again and again."""


def random_block(vocabulary: int, length: int, seed: int, number: int) -> Tensor:
    """A block of random tokens, (length,) int64, one of :data:`REPEATED`: a loss that falls shows that steps are real."""
    generator = torch.Generator().manual_seed(seed + number % REPEATED)
    return torch.randint(vocabulary, (length,), generator=generator)


def peak_memory(device: str) -> float:
    """Bytes: of the tensors on the GPU since the last reset, or of this whole process so far on a CPU."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def run_stage(
    config: Config, s: Shapes, name: str, options: argparse.Namespace
) -> tuple[float, float, float, list[float]]:
    """(tokens/s, peak memory in bytes, trained parameters, loss of every step) of one stage."""
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stage, trainer = config.retrain.stages[name], config.trainer
    lightning.seed_everything(config.seed, verbose=False)
    model = random_moe(config, s, options)
    training = Training.of(config, name)
    apply_policy(model, stage.train, config.retrain.lora, master_weights=training.master_weights)
    use_experts(model, trainer.experts, autocast=training.autocast)
    if trainer.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    accumulation = stage.accumulation or trainer.accumulation
    module = MoERetraining(
        model,
        training,
        partial(random_block, s.vocabulary, config.retrain.length, config.seed),
        key="",
        first_block=0,
        accumulation=accumulation,
        log_every=config.retrain.log_every,
        shard=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        build_trainer(
            trainer,
            layer_class=type(decoder_layers(model)[0]),
            steps=module.steps,
            accumulation=accumulation,
            checkpoints=Path(folder),
            checkpoint_every=module.steps + 1,
            loggers=[],
        ).fit(module)
    points = module.points()
    counted = points[options.warm_up :]
    rate = statistics.median(point["tokens_per_second"] for point in counted)
    learned = float(sum(p.numel() for p in model.parameters() if p.requires_grad))
    return rate, peak_memory(options.device), learned, [point["loss"] for point in points]


def device_peak(config: Config, options: argparse.Namespace) -> float:
    """FLOP/s of matrix products in the stage's precision.

    Raises:
        UserError: the GPU is none of ``plan.devices``.
    """
    if options.peak is not None:
        return float(options.peak) * 1e12
    name = "cpu"
    if options.device == "cuda":
        full = torch.cuda.get_device_name()
        found = [entry for part, entry in NAMES.items() if part in full]
        if not found:
            raise UserError(f"no peak is known of {full}: give --peak, in TFLOP/s of bfloat16 without sparsity")
        name = found[0]
    device = config.plan.devices[name]
    return device.float32 if config.trainer.precision.startswith("32") else device.bfloat16


def table(options: argparse.Namespace) -> list[str]:
    """The lines to print.

    Raises:
        UserError: no such device here, or an override that cannot be.
    """
    lines: list[str] = []
    for setting in options.settings:
        config = configured(setting, options)
        check_devices(config.trainer)
        peak = device_peak(config, options)
        s = shapes(read_architecture(llama_config(options.shape).to_dict()), config)
        for name, stage in config.retrain.stages.items():
            rate, memory, learned, losses = run_stage(config, s, name, options)
            each = float(flops.training(s, stage, options.length, checkpointing=False))
            if not lines:
                lines += [
                    "",
                    f"{options.shape}: {s.total / 1e9:.3f} B parameters, {s.layers} layers; {options.length} tokens a sequence, "
                    f"{options.micro_batch} × {options.accumulation} a step, {config.trainer.precision}, "
                    f"gradient checkpointing {config.trainer.gradient_checkpointing}; median of {options.steps} steps; peak "
                    f"{peak / 1e12:.2f} TFLOP/s; {machine(torch.device(options.device))}",
                    "",
                    "| DIVE | stage | trained | tokens/s | GFLOP a token | MFU | peak memory | loss, first to last |",
                    "| --- | --- | --- | --- | --- | --- | --- | --- |",
                ]
            lines.append(
                f"| {setting} | {name} | {learned / 1e6:.3f} M | {rate:.0f} | {each / 1e9:.3f} | {rate * each / peak:.1%} | "
                f"{memory / 1e9:.2f} GB | {losses[0]:.2f} to {losses[-1]:.2f} |"
            )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--settings", nargs="+", choices=("1/8", "2/8"), default=["1/8", "2/8"])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of a forward pass")
    parser.add_argument("--accumulation", type=int, default=4, help="forward passes of an optimiser step")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps that count")
    parser.add_argument("--warm-up", type=int, default=3, help="optimiser steps before them")
    parser.add_argument("--peak", type=float, help="TFLOP/s, in place of what conf/plan says of the device")
    parser.add_argument("overrides", nargs="*", help="of the configuration")
    try:
        print("\n".join(table(parser.parse_intermixed_args(arguments))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
