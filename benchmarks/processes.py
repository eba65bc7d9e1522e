r"""Building experts in several processes, against one.

    python -m benchmarks.processes
    python -m benchmarks.processes --shape smollm2 --layers 2 --tokens 47104 --processes 1,2 moe.refined.steps=100

Every process has one thread and, where there are as many, a core of its own. Experts of the first layers of a model of random
weights are built from random tokens by the default recipe and these overrides. Prints one table: seconds of the wall clock, from
when all processes have the model until all have the last layer, how many times as fast as the first number of processes, and how
far the experts are from that one's.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import multiprocessing

from benchmarks.shapes import SHAPES, random_model
from benchmarks.timing import machine
from dive.cli import composed
from dive.moe.build import build_layers
from dive.ranks import Ranks


def build(rank: int, processes: int, settings: argparse.Namespace, directory: Path) -> None:
    """Build in one of the processes; the first writes layers and seconds."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= processes:
        os.sched_setaffinity(0, {cores[rank]})
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=processes
    )
    config = composed(settings.overrides)
    model = random_model(settings)
    model.model.layers = model.model.layers[: settings.layers]
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.tokens // settings.length, settings.length)
    tokens = torch.randint(model.config.vocab_size, size, generator=generator)
    torch.distributed.barrier()
    start = time.perf_counter()
    layers = build_layers(
        model,
        [tokens],
        config.pruning,
        config.moe.effective(config.pruning),
        batch=config.calibration_domains.batch,
        seed=settings.seed,
        ranks=Ranks(rank, processes),
    )
    found = {f"{number}.{name}": t for number, layer in enumerate(layers) for name, t in layer.tensors().items()}
    torch.distributed.barrier()
    if rank == 0:
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        save_file({"seconds": seconds} | {name: t.contiguous() for name, t in found.items()}, directory / "built")
    torch.distributed.destroy_process_group()


def measured(settings: argparse.Namespace, processes: int) -> dict[str, torch.Tensor]:
    """What :func:`build` wrote."""
    with tempfile.TemporaryDirectory() as directory:
        work = partial(build, processes=processes, settings=settings, directory=Path(directory))
        multiprocessing.start_processes(work, nprocs=processes, start_method="spawn")
        return load_file(Path(directory) / "built")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, default=2, help="of the model, the first so many")
    parser.add_argument("--tokens", type=int, default=47104)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--processes", default="1,2", help="how many, one row each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="as of dive.train")
    settings = parser.parse_intermixed_args(arguments)
    settings.device, settings.dtype = torch.device("cpu"), torch.float32
    print(f"{machine()}, one thread a process; {settings.tokens} tokens, {settings.layers} layers of {settings.shape}")
    print("| processes | seconds | times as fast | masks that differ | largest relative distance of a tensor |")
    print("| --- | --- | --- | --- | --- |")
    first: dict[str, torch.Tensor] | None = None
    for processes in map(int, settings.processes.split(",")):
        found = measured(settings, processes)
        seconds = float(found.pop("seconds"))
        if first is None:
            first, base = found, seconds
        masks = sum(int((found[name] != t).sum()) for name, t in first.items() if t.dtype is torch.bool)
        apart = max(
            float((found[name] - t).norm() / t.norm().clamp_min(1e-30))
            for name, t in first.items()
            if t.is_floating_point()
        )
        print(f"| {processes} | {seconds:.3g} | {base / seconds:.2f} | {masks} | {apart:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
