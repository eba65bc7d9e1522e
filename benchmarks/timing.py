"""Timing variants of one computation side by side."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Seconds of every variant in each round, {name: (rounds,)}; each variant runs once before, untimed.

    In a round the variants run one after another, so that whatever else the machine does hits all of them alike. With one
    thread on a CPU it is the process's own time on it, which waiting for other processes does not lengthen.
    """
    cuda = device is not None and device.type == "cuda"
    clock = time.perf_counter if cuda or torch.get_num_threads() > 1 else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            if cuda:
                torch.cuda.synchronize(device)
            start = clock()
            run()
            if cuda:
                torch.cuda.synchronize(device)
            if number:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def machine(device: torch.device | None = None) -> str:
    """What it ran on: the processor's or the GPU's name, and the threads."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    name = f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"
