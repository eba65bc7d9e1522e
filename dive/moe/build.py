"""From a dense model and calibration tokens to the experts of every layer, for every construction.

Shapes: N sequences, T tokens each.
"""

import contextlib
import importlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dive.config import MoEConfig, PlainConfig, PruningConfig
from dive.errors import require
from dive.eval.routing import mask_overlap
from dive.model.families import decoder_layers, ffn
from dive.model.recipe import Dense
from dive.moe.layer import ExpertLayer
from dive.moe.shared import beside_shared
from dive.moe.walk import GivenStatistics, StatisticsWalk, Walk
from dive.progress import track
from dive.pruning.statistics import ChannelStatistics
from dive.ranks import ALONE, Ranks
from dive.store import Artifact, HasStore, Place, write_json
from dive.together import from_first, ranks, shared_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

LAYER_FILE = "layer_{:03d}.safetensors"
UNFINISHED = "unfinished"
ONE_EXPERT = MoEConfig(experts=1, top_k=1, plain=PlainConfig())
"""One pruned FFN a layer, from all text together: what everything else is compared with."""


@torch.no_grad()
def build_layers(
    model: "PreTrainedModel",
    groups: Sequence[Tensor] | Sequence[ChannelStatistics],
    pruning: PruningConfig,
    moe: MoEConfig,
    *,
    batch: int = 16,
    seed: int,
    finished: Iterable[ExpertLayer] = (),
    ranks: Ranks = ALONE,
) -> Iterator[ExpertLayer]:
    """Experts of one layer after another, but of those that stay dense, in one pass over the calibration tokens.

    Processes that compute together share the tokens and the experts out; all yield the same layers. One layer's statistics are
    alive at a time: those of every group, or where experts are refined on tokens of one expert.

    Args:
        model: dense model.
        groups: calibration tokens (N, T) int64 of each group, or of all text together; or statistics of each group over all
            layers, where the construction needs no more (see :func:`dive.collect_statistics`).
        batch: sequences per forward pass.
        seed: of the first layer.
        finished: the first layers, of an interrupted construction: the tokens pass through them, and they are not yielded.
        ranks: the processes that compute together; each is given all groups.

    Raises:
        UserError: there are not as many groups as experts, the statistics lack what the settings need, or the model's hidden
            states are not finite.
    """
    _check_groups(len(groups), moe)
    construction: Any = importlib.import_module(f"dive.moe.constructions.{moe.construction}")
    statistics = [group for group in groups if isinstance(group, ChannelStatistics)]
    require(
        not statistics or construction.WALK is StatisticsWalk,
        f"moe.{moe.construction} needs the tokens themselves, not statistics of them; give tokens, or set moe=plain",
    )
    walk: Walk[Any] = (
        GivenStatistics(statistics)
        if statistics
        else construction.WALK(model, groups, pruning, moe, batch=batch, seed=seed, ranks=ranks)
    )
    built = iter(finished)
    description = f"building {moe.experts} experts" if moe.experts > 1 else "pruning"
    for number in track(range(len(decoder_layers(model))), description, "layer"):
        if number in moe.dense_layers:
            walk.keep(number)
            continue
        layer = next(built, None)
        known = layer is not None
        if layer is None:  # what is shown may be F² numbers a group: nothing here may hold on to it
            weights, place = ffn(model, number), seed + 1000 * number
            if moe.shares:
                layer = beside_shared(construction, weights, walk.read(number), pruning, moe, seed=place, ranks=ranks)
            else:
                layer = construction.layer(weights, walk.read(number), pruning, moe, seed=place, ranks=ranks)
        else:
            walk.skip(number)
        walk.leave(layer)
        if not known:
            yield layer
        del layer


def _check_groups(count: int, moe: MoEConfig) -> None:
    require(count > 0, "there are no groups of calibration text")
    wanted = (
        moe.experts if moe.plain is not None or (moe.refined is not None and moe.experts > 1 and count > 1) else count
    )
    require(
        count == wanted,
        f"moe.{moe.construction} builds an expert of each group: moe.experts ({moe.experts}) differs from the {count} groups",
    )


@shared_step("experts", "experts and routers of every layer", version=3)
def build_experts(
    place: Place,
    run: HasStore,
    batch: int,
    *,
    model: Dense,
    tokens: Sequence[Tensor],
    pruning: PruningConfig,
    moe: MoEConfig,
    seed: int,
) -> float:
    """Experts and routers, a file of each layer that does not stay dense, from a pass over the calibration tokens.

    An interrupted construction goes on from its last whole layer.

    Args:
        batch: sequences per forward pass.
        tokens: calibration sequences (N, T) int64 of each group.

    Returns:
        Seconds that interrupted attempts before this one took.
    """
    start = time.monotonic()
    place.partial.mkdir(parents=True, exist_ok=True)
    numbers = [number for number in range(model.source.config.num_hidden_layers) if number not in moe.dense_layers]
    finished = whole_layers(place.partial, numbers)
    finished = finished[: from_first(len(finished))]  # files on a shared disk may be late
    before = 0.0
    if finished and place.writes:
        log.info("experts: going on after %d of %d layers", len(finished), len(numbers))
        with contextlib.suppress(OSError, ValueError):  # cut short: the time is not worth more than the layers
            before = float((place.partial / "seconds").read_text())
    if len(finished) < len(numbers):
        model.slot.clear()  # measured already
        left = iter(numbers[len(finished) :])  # enumerate would hold a layer while the next is built
        known = map(read_layer, finished)
        for layer in build_layers(
            model.load(), tokens, pruning, moe, batch=batch, seed=seed, finished=known, ranks=ranks()
        ):
            if not place.writes:
                continue
            tensors = {name: tensor.cpu().contiguous() for name, tensor in layer.tensors().items()}
            save_file(tensors, place.partial / UNFINISHED)
            with (place.partial / UNFINISHED).open("rb") as written:
                os.fsync(written.fileno())  # or a power cut leaves a file of the right size without its content
            write_json(place.partial / "seconds", before + time.monotonic() - start)
            os.replace(place.partial / UNFINISHED, place.partial / LAYER_FILE.format(next(left)))
            del layer, tensors
    if not place.writes:
        return before
    built = whole_layers(place.partial, numbers)
    assert len(built) == len(numbers), f"{len(built)} of {len(numbers)} layers"
    for file in built:  # which stay until the artifact is whole
        try:
            os.link(file, place.directory / file.name)
        except OSError:  # a file system without links
            shutil.copyfile(file, place.directory / file.name)
    return before


def read_experts(artifact: Artifact) -> Iterator[ExpertLayer]:
    """Layers of :func:`build_experts`, one at a time."""
    return map(read_layer, layer_files(artifact.path))


def read_layer(file: Path) -> ExpertLayer:
    """One layer of :func:`build_experts`."""
    return ExpertLayer(**load_file(file))


def layer_files(directory: Path) -> list[Path]:
    """Files of :func:`build_experts`, in the order of the layers."""
    return sorted(directory.glob("layer_*.safetensors"))


def whole_layers(directory: Path, numbers: Sequence[int]) -> list[Path]:
    """The files of the layers of these numbers up to the first one that is missing or cut short."""
    found: list[Path] = []
    for number, file in zip(numbers, layer_files(directory), strict=False):
        try:
            with safe_open(file, framework="pt"):  # checks the size of the file against its header
                pass
        except SafetensorError:
            break
        if file.name != LAYER_FILE.format(number):
            break
        found.append(file)
    return found


def expert_overlap(experts: Artifact) -> list[list[float]]:
    """Jaccard index of the channels of every pair of experts, averaged over layers."""
    masks = []
    for file in layer_files(experts.path):
        with safe_open(file, framework="pt") as tensors:  # the masks alone: the weights may be tens of gigabytes
            masks.append(tensors.get_tensor("masks"))
    overlap: list[list[float]] = mask_overlap(torch.stack(masks)).tolist()
    return overlap
