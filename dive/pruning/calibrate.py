"""Collecting channel statistics of a dense model: one pass over the tokens of all domains."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dive.errors import UserError
from dive.model.layers import Track
from dive.model.recipe import Dense
from dive.progress import track
from dive.pruning.statistics import ChannelStatistics, batch_statistics, nothing, over_ranks, sampled_rows, stack_layers
from dive.pruning.taylor import taylor_scores
from dive.ranks import ALONE, Ranks, sequences_of, shared_tokens
from dive.store import Artifact, HasStore, Place, write_json
from dive.together import ranks as all_ranks
from dive.together import shared_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Calibration:
    """Statistics of every set of tokens, of one layer after another; one layer's are alive at a time.

    Processes that compute together share the sequences out, and all have the statistics of all of them.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokens: Mapping[str, Tensor],
        *,
        batch: int = 16,
        second_moments: bool,
        inputs: int = 0,
        taylor: bool = False,
        active_channels: int = 0,
        seed: int = 42,
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            model: dense model.
            tokens: {name: (N, T) int64}; a name stands for a domain, or for a group of domains.
            batch: sequences per forward pass.
            second_moments: also F × F second moments.
            inputs: FFN inputs to keep for each name, of so many of its tokens; all if it has fewer.
            taylor: also Taylor scores, by a pass with gradients of its own, here and now.
            active_channels: also count co-activation of so many channels a token, F × F.
            seed: of the tokens whose FFN inputs are kept.
            ranks: the processes that compute together.

        Raises:
            UserError: tokens are not a non-empty int64 matrix.
        """
        self.names, self._ranks, self._inputs = list(tokens), ranks, inputs > 0
        self.second_moments, self.active_channels = second_moments, active_channels
        batches: list[Tensor] = []
        self._owner: list[int] = []
        self._keep: list[Tensor | None] = []
        shares = sequences_of(ranks, [len(matrix) for matrix in tokens.values()])
        for position, ((name, matrix), share) in enumerate(zip(tokens.items(), shares, strict=True)):
            if matrix.ndim != 2 or matrix.dtype != torch.int64 or matrix.numel() == 0:
                raise UserError(
                    f"tokens of {name!r} must be a non-empty (samples, length) int64 matrix, not {tuple(matrix.shape)} "
                    f"{matrix.dtype}"
                )
            # At random: tokens at even distances would stand at a few positions of their sequences alone.
            sampled = sampled_rows(matrix.numel(), inputs, seed=seed + position).sort().values if inputs else None
            for start in range(share.start, share.stop, batch):
                rows = matrix[start : min(start + batch, share.stop)]
                first = start * matrix.shape[1]
                batches.append(rows)
                self._owner.append(position)
                stop = first + rows.numel()
                here = None if sampled is None else sampled[(sampled >= first) & (sampled < stop)] - first
                self._keep.append(here)
        self._taylor = None
        if taylor:
            shares_of = dict(zip(tokens, shared_tokens(ranks, list(tokens.values())), strict=True))
            own = taylor_scores(model, shares_of, batch=batch)
            self._taylor = {name: ranks.sum(scores) for name, scores in own.items()}
        self._track = Track(model, batches)

    def layer(self, number: int) -> list[ChannelStatistics]:
        """Statistics (L = 1) of each set of tokens at the layer that comes next."""
        merged = [ChannelStatistics(0, torch.empty(0), torch.empty(0)) for _ in self.names]
        for seen in self._track.run(number):
            chosen = self._keep[seen.index]
            merged[self._owner[seen.index]] += batch_statistics(
                seen.channels,
                second_moment=self.second_moments,
                inputs=None if chosen is None else seen.inputs[chosen.to(seen.inputs.device)],
                active_channels=self.active_channels,
            )
        if self._ranks.count > 1:
            merged = [over_ranks(found if found.count else self._nothing(), self._ranks) for found in merged]
        if self._taylor is not None:
            for name, statistics in zip(self.names, merged, strict=True):
                statistics.taylor = self._taylor[name][number : number + 1]
        return merged

    def _nothing(self) -> ChannelStatistics:
        model = self._track.model
        return nothing(
            model.config.intermediate_size,
            model.config.hidden_size,
            model.device,
            second_moment=self.second_moments,
            inputs=self._inputs,
            active_channels=self.active_channels,
        )

    def skip(self, number: int) -> None:
        """Let the tokens merely pass through the layer that comes next."""
        for _ in self._track.run(number):
            pass


def collect_statistics(
    model: "PreTrainedModel",
    tokens: Mapping[str, Tensor],
    *,
    batch: int = 16,
    second_moments: bool = True,
    inputs: int = 2048,
    taylor: bool = False,
    active_channels: int = 0,
    seed: int = 42,
    ranks: Ranks = ALONE,
) -> dict[str, ChannelStatistics]:
    """Statistics of every domain over all layers, in one forward pass.

    With second moments they take domains × layers × F² × 4 bytes of host memory; without, domains × layers × F × 16.

    Args:
        model: dense model, see :func:`dive.load_dense`.
        tokens: {domain: (N, L) int64}, N sequences of L tokens.
        batch: sequences per forward pass.
        second_moments: needed by ``compensation="least_squares"``.
        inputs: FFN inputs kept per domain and layer, of tokens at random, for ``router_init="distilled"``.
        taylor: needed by ``metric="taylor"``; one more pass, forward and backward.
        active_channels: channels counted as active on a token, for ``moe=coactivation``; 0 counts none.
        seed: of the tokens whose FFN inputs are kept.
        ranks: the processes that compute together; each is given all tokens and gets all statistics.

    Raises:
        UserError: a domain's tokens are not a non-empty int64 matrix.
    """
    calibration = Calibration(
        model,
        tokens,
        batch=batch,
        second_moments=second_moments,
        inputs=inputs,
        taylor=taylor,
        active_channels=active_channels,
        seed=seed,
        ranks=ranks,
    )
    by_layer = [
        [_to_host(statistics) for statistics in calibration.layer(number)]
        for number in track(range(model.config.num_hidden_layers), "calibrating", "layer")
    ]
    return {name: stack_layers(layer[i] for layer in by_layer) for i, name in enumerate(tokens)}


def _to_host(statistics: ChannelStatistics) -> ChannelStatistics:
    def host(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cpu()

    return ChannelStatistics(
        count=statistics.count,
        mean=statistics.mean.cpu(),
        squared_deviations=statistics.squared_deviations.cpu(),
        second_moment=host(statistics.second_moment),
        inputs=host(statistics.inputs),
        taylor=host(statistics.taylor),
        coactivation=host(statistics.coactivation),
    )


@shared_step("statistics", "what each channel does on each kind of text")
def calibrate(
    place: Place, run: HasStore, batch: int, *, model: Dense, tokens: Mapping[str, Tensor], taylor: bool
) -> None:
    """Channel statistics of every domain, in one pass over the dense model; Taylor scores take a second one.

    Without second moments, which :mod:`dive.moe.build` takes a layer at a time.

    Args:
        batch: sequences per forward pass.
    """
    statistics = collect_statistics(
        model.load(), tokens, batch=batch, second_moments=False, inputs=0, taylor=taylor, ranks=all_ranks()
    )
    if not place.writes:
        return
    for number, found in enumerate(statistics.values()):
        tensors = {"mean": found.mean, "squared_deviations": found.squared_deviations}
        if found.taylor is not None:
            tensors["taylor"] = found.taylor
        file = place.directory / f"{number:03d}.safetensors"  # a domain's name may be no name of a file
        save_file(tensors, file, metadata={"count": str(found.count)})
    write_json(place.directory / "domains.json", list(statistics))


def read_statistics(artifact: Artifact) -> dict[str, ChannelStatistics]:
    """{domain: statistics} of :func:`calibrate`."""
    found = {}
    for number, domain in enumerate(artifact.read("domains.json")):
        with safe_open(artifact.path / f"{number:03d}.safetensors", framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # not a mapping
            count = int(stored.metadata()["count"])
        found[domain] = ChannelStatistics(
            count, tensors["mean"], tensors["squared_deviations"], taylor=tensors.get("taylor")
        )
    return found
