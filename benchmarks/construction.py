r"""Time and operations of each part of building experts, against the dense layer's bare forward pass on the same tokens.

    python -m benchmarks.construction
    python -m benchmarks.construction --model DIR --layers 0 14 29 --tokens 47104 \
        calibration_domains=local calibration_domains.path=DOMAINS

Builds the experts of a few layers as a run with these overrides of `dive.train` does, from that run's calibration tokens, cut to
--tokens. The functions that do the work are timed where they stand, each without those that it calls; layers that are not
named stay dense. Operations are those of matrix products, attention and factorisations. With one thread on a CPU the clock is the
process's own. Prints one table.
"""

import argparse
import functools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import machine
from dive.calibration_domains.texts import load_domains
from dive.cli import composed
from dive.config import Config
from dive.errors import UserError, require
from dive.inputs import sample_tokens
from dive.model.families import FFN, decoder_layers, ffn
from dive.model.layers import Track
from dive.model.load import document_tokens, load_dense
from dive.moe.constructions import refined
from dive.moe.layer import ExpertLayer
from dive.moe.walk import TokenWalk

PARTS = {
    "inputs and targets": (TokenWalk, "read"),
    "k-means": (refined, "first_assignment"),
    "second moments": (refined, "token_statistics"),
    "elimination": (refined, "choose_channels"),
    "least squares": (refined, "least_squares"),
    "errors of all experts": (refined, "expert_errors"),
    "router fit": (refined, "fit_router"),
    "re-routing": (refined, "likeliest_experts"),
    "local steps": (refined, "train_layer"),
    "the rebuilt layer's outputs": (TokenWalk, "leave"),
}
"""Where the code of each part stands."""
BARE, REST, WRITING = "bare forward pass", "the rest", "writing"
OPERATIONS = {
    torch.ops.aten._grouped_mm: lambda rows, matrices, *_, **__: 2 * rows[0] * rows[1] * matrices[-1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda queries, keys, *_, **__: (
        4 * math.prod(queries) * keys[2]
    ),
    torch.ops.aten.linalg_cholesky_ex: lambda shape, *_, **__: shape[0] ** 3 // 3,
    torch.ops.aten.cholesky_inverse: lambda shape, *_, **__: 2 * shape[0] ** 3 // 3,
    torch.ops.aten.cholesky_solve: lambda right, factor, *_, **__: 2 * factor[0] ** 2 * right[1],
}
"""Of what torch's counter does not know, from the shapes."""


class Clock:
    """Seconds and operations of parts, each without the parts within it."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.operations: dict[str, int] = {}
        self._device, self._inner = device, [(0.0, 0)]
        self._counter = FlopCounterMode(display=False, custom_mapping=OPERATIONS)
        single = device.type == "cpu" and torch.get_num_threads() == 1
        self._now = time.process_time if single else time.perf_counter

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Time the parts within, where they stand."""
        with ExitStack() as stack:
            stack.enter_context(self._counter)
            for name, (owner, attribute) in PARTS.items():
                stack.enter_context(mock.patch.object(owner, attribute, self._timed(name, getattr(owner, attribute))))
            yield

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of this name."""
        self._inner.append((0.0, 0))
        start, before = self._time(), self._counter.get_total_flops()
        yield
        seconds, operations = self._time() - start, self._counter.get_total_flops() - before
        within, within_operations = self._inner.pop()
        around, around_operations = self._inner.pop()
        self._inner.append((around + seconds, around_operations + operations))
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds - within
        self.operations[name] = self.operations.get(name, 0) + operations - within_operations

    def _time(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._now()

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **settings: Any) -> Any:
            with self.part(name):
                return function(*arguments, **settings)

        return run


def whole(weights: FFN) -> ExpertLayer:
    """The dense FFN as a layer of one expert."""
    hidden, channels = weights.down.shape
    return ExpertLayer(
        masks=torch.ones(1, channels, dtype=torch.bool),
        gate_up=torch.cat([weights.gate, weights.up])[None],
        down=weights.down[None],
        router=weights.down.new_zeros(1, hidden),
    )


def calibration_tokens(config: Config, tokenizer: Any, count: int) -> Tensor:
    """(N, length) int64, as many sequences of each domain as make up ``count`` tokens."""
    texts = {domain.name: domain.train for domain in load_domains(config.calibration_domains, seed=config.seed)}
    found, _ = sample_tokens(config, texts, lambda document: document_tokens(tokenizer, document))
    rows = count // (config.calibration_domains.length * len(found))
    require(rows > 0, f"--tokens ({count}) is less than a sequence of each of the {len(found)} domains")
    return torch.cat([matrix[:rows] for matrix in found.values()])


@torch.no_grad()
def measure(options: argparse.Namespace) -> tuple[Clock, int]:
    """(time and operations of all parts over the named layers, tokens).

    Raises:
        UserError: an override, a layer, or the number of tokens cannot be.
    """
    config = composed([*options.overrides, f"model.dtype={options.dtype}"])
    moe, pruning, batch = config.moe, config.pruning, config.calibration_domains.batch
    require(moe.refined is not None, "only moe=default builds experts from tokens")
    model, tokenizer = load_dense(options.model, dtype=options.dtype, device=options.device)
    layers = options.layers or range(len(decoder_layers(model)))
    require(max(layers) < len(decoder_layers(model)), f"--layers: the model has {len(decoder_layers(model))}")
    tokens = calibration_tokens(config, tokenizer, options.tokens)
    bare = Track(model, tokens.split(batch))
    walk = TokenWalk(model, [tokens], pruning, moe, batch=batch, seed=config.seed)
    clock = Clock(model.device)
    for number in range(max(layers) + 1):
        if number not in layers:
            for _ in bare.run(number):
                pass
            walk.skip(number)
            walk.leave(whole(ffn(model, number)))
            continue
        with clock.counting():
            with clock.part(BARE):
                for _ in bare.run(number):
                    pass
            with clock.part(REST):
                shown = walk.read(number)
                layer = refined.layer(ffn(model, number), shown, pruning, moe, seed=config.seed + 1000 * number)
                walk.leave(layer)
            with clock.part(WRITING), tempfile.TemporaryDirectory() as folder:
                save_file({n: t.cpu().contiguous() for n, t in layer.tensors().items()}, Path(folder) / "layer")
    return clock, tokens.numel()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="directory or hub id of a dense model")
    parser.add_argument("--layers", type=int, nargs="+", help="their numbers; all by default")
    parser.add_argument("--tokens", type=int, default=24576, help="calibration tokens, of all domains together")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    options, options.overrides = parser.parse_known_args(arguments)
    clock, tokens = measure(options)
    device = torch.device(options.device)
    print(f"\n{options.model}, layers {options.layers or 'all'}, {tokens} tokens; {machine(device)}\n")
    print("| part | seconds | / bare | GFLOP | / bare |")
    print("| --- | --- | --- | --- | --- |")
    whole_seconds = sum(clock.seconds.values()) - clock.seconds[BARE]
    whole_operations = sum(clock.operations.values()) - clock.operations[BARE]
    order = [BARE, *(name for name in PARTS if name in clock.seconds), WRITING, REST]
    rows = [(name, clock.seconds[name], clock.operations[name]) for name in order]
    for name, seconds, operations in [*rows, ("building, all of it", whole_seconds, whole_operations)]:
        of_time, of_work = seconds / clock.seconds[BARE], operations / clock.operations[BARE]
        print(f"| {name} | {seconds:.2f} | {of_time:.2f} | {operations / 1e9:.4g} | {of_work:.2f} |")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
