r"""Time of the clustering that building experts does, against scipy's.

    python -m benchmarks.clustering
    python -m benchmarks.clustering --rows 32768x4096 --channels 11008 --rounds 1
    python -m benchmarks.clustering --device cuda --rows 32768x4096

k-means of tokens beside `kmeans2` in float64, on rows in heaps that overlap, as many rounds each; and the division of channels
among experts of one size beside the Hungarian method (`linear_sum_assignment`), on squared distances of the tokens on which
channels are active. scipy runs on one core of the host wherever ours does. Both divide the same numbers; `cost / scipy's` is the
sum of distances over scipy's. Variants take turns over several rounds; printed are medians, and ratios within a round. Prints
one table.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.timing import interleaved, machine, median_ratio
from dive.moe.assignment import Floats, Integers, balanced_assignment
from dive.moe.clustering import ROUNDS, kmeans

TOKENS = 2000
"""On which channels are active or not."""


@dataclass(frozen=True, slots=True)
class Case:
    """Two ways to divide the same things."""

    name: str
    ours: Callable[[], Any]
    scipys: Callable[[], Any]
    cost: Callable[[Any], float]
    """Sum of the distances of what either gives."""


def tokens(count: int, width: int, seed: int) -> Tensor:
    """(count, width) rows in 40 heaps that overlap."""
    generator = torch.Generator().manual_seed(seed)
    heaps = torch.randn(40, width, generator=generator) * torch.rand(40, 1, generator=generator)
    spread = torch.linspace(0.1, 2.0, width)
    return (
        heaps[torch.randint(40, (count,), generator=generator)]
        + torch.randn(count, width, generator=generator) * spread
    )


def channel_distances(channels: int, experts: int, seed: int) -> Floats:
    """(channels, experts) squared distances of 0-or-1 patterns over tokens from some of them; most channels seldom fire."""
    rng = np.random.default_rng(seed)
    topic, own = rng.integers(0, 5, (TOKENS, 1)), rng.integers(0, 5, channels)
    rate = rng.beta(0.3, 5.0, channels)
    fires = (rng.random((TOKENS, channels)) < np.where(topic == own, np.minimum(4 * rate, 1.0), rate)).astype(
        np.float32
    )
    seeds = fires[:, np.argsort(-fires.sum(axis=0))[:experts]]
    active = fires.sum(axis=0, dtype=np.float64)
    distances: Floats = active[:, None] - 2.0 * (fires.T @ seeds) + seeds.sum(axis=0, dtype=np.float64)
    return distances


def of_tokens(rows: Tensor, experts: int, seed: int, device: torch.device) -> Case:
    """k-means; both give centres."""
    there, double = rows.to(device), rows.double().numpy()

    def cost(centres: Tensor) -> float:
        apart = (torch.cdist(part.double(), centres.cpu().double()).amin(dim=1) for part in rows.split(4096))
        return sum(float(part.square().sum()) for part in apart)

    return Case(
        f"k-means of {rows.shape[0]} × {rows.shape[1]}",
        lambda: kmeans(there, experts, seed=seed),
        lambda: torch.from_numpy(kmeans2(double, experts, iter=ROUNDS, minit="++", rng=seed)[0]),
        cost,
    )


def of_channels(distances: Floats) -> Case:
    """Division; both give the expert of each channel."""
    channels, experts = distances.shape
    sizes = np.full(experts, channels // experts)
    sizes[: channels % experts] += 1

    def hungarian() -> Integers:
        place = np.repeat(np.arange(experts), sizes)
        taken: Integers = place[linear_sum_assignment(distances[:, place])[1]]
        return taken

    return Case(
        f"division of {channels} channels",
        lambda: balanced_assignment(distances, sizes),
        hungarian,
        lambda found: float(distances[np.arange(channels), found].sum()),
    )


def row(case: Case, rounds: int, device: torch.device) -> str:
    """One line of the table."""
    found: dict[str, Any] = {}

    def keeping(name: str, run: Callable[[], Any]) -> Callable[[], object]:
        def keep() -> None:
            found[name] = run()

        return keep

    variants = {"ours": keeping("ours", case.ours), "scipy's": keeping("scipy's", case.scipys)}
    seconds = interleaved(variants, rounds=rounds, device=device)
    cost = case.cost(found["ours"]) / case.cost(found["scipy's"])
    ours, theirs = (statistics.median(seconds[name]) for name in variants)
    times = median_ratio(seconds["scipy's"], seconds["ours"])
    return f"| {case.name} | {ours:.3g} | {theirs:.3g} | {times:.3g} | {cost:.4f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=["32768x576", "8192x4096"], help="tokens x width of each k-means")
    parser.add_argument("--channels", type=int, nargs="*", default=[1536], help="of each division")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of our k-means")
    options = parser.parse_args(arguments)
    print(f"\n{options.experts} experts, {options.rounds} rounds; {machine()}; k-means on {machine(options.device)}\n")
    print("| what | ours, s | scipy's, s | scipy's / ours | cost / scipy's |")
    print("| --- | --- | --- | --- | --- |")
    for size in options.rows:
        count, width = map(int, size.split("x"))
        case = of_tokens(tokens(count, width, options.seed), options.experts, options.seed, options.device)
        print(row(case, options.rounds, options.device), flush=True)
    for channels in options.channels:
        case = of_channels(channel_distances(channels, options.experts, options.seed))
        print(row(case, options.rounds, options.device), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
