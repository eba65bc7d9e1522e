"""Calibration tokens on their way through the layers, and what a construction is shown of each.

Shapes: T calibration tokens, D hidden width, F FFN channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dive.config import Compensation, Metric, MoEConfig, PruningConfig, Start
from dive.errors import UserError
from dive.model.families import ffn
from dive.model.layers import Track
from dive.moe.layer import CHUNK, ExpertLayer, convert, dense_output, float32, layer_output, likeliest_experts
from dive.pruning.calibrate import Calibration
from dive.pruning.compensation import held_out
from dive.pruning.statistics import ChannelStatistics
from dive.ranks import ALONE, Ranks, Share, batches, shared_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shown = TypeVar("Shown", covariant=True)


class Walk(Protocol[Shown]):
    """For each layer in turn: :meth:`read`, or :meth:`skip` where its experts are there; then :meth:`leave`. Or :meth:`keep`."""

    def read(self, number: int) -> Shown:
        """What a construction is shown of the layer that comes next."""

    def skip(self, number: int) -> None:
        """Let the tokens pass through the layer that comes next."""

    def leave(self, layer: ExpertLayer) -> None:
        """Go on from the layer, whose experts are these."""

    def keep(self, number: int) -> None:
        """Let the tokens pass through the layer that comes next, which stays dense, and go on from it."""


# ------------------------------------------------------------------------------------------------------ from statistics


@dataclass(slots=True)
class Group:
    """What one FFN computed on the tokens of one group."""

    statistics: ChannelStatistics
    """Of one layer."""
    held_out: ChannelStatistics | None = None
    """Of other tokens of the group, by which a ridge of null is chosen."""


def together(groups: Sequence[Group]) -> Group:
    """All groups as one."""
    others = [group.held_out for group in groups if group.held_out is not None]
    return Group(
        sum((group.statistics for group in groups[1:]), groups[0].statistics),
        sum(others[1:], others[0]) if others else None,
    )


class StatisticsWalk:
    """Shows the channels' statistics of each group; those of one layer are alive at a time."""

    def __init__(
        self,
        model: "PreTrainedModel",
        groups: Sequence[Tensor],
        pruning: PruningConfig,
        moe: MoEConfig,
        *,
        batch: int,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            model: dense model.
            groups: calibration tokens (N, T) int64 of each group.
            batch: sequences per forward pass.
            seed: of what is sampled among the tokens.
            ranks: the processes that compute together.
        """
        refits = pruning.compensation is Compensation.least_squares
        self._halves = refits and pruning.ridge is None
        parts = {f"group {number}": tokens for number, tokens in enumerate(groups)}
        if self._halves:
            held = {name: held_out(len(tokens)) for name, tokens in parts.items()}
            fitted = {name: tokens[~held[name]] for name, tokens in parts.items()}
            parts = fitted | {f"{name}, held out": tokens[held[name]] for name, tokens in parts.items()}
        self._calibration = Calibration(
            model,
            parts,
            batch=batch,
            second_moments=refits,
            inputs=-(-moe.distillation.tokens // len(groups)) if moe.samples_inputs else 0,
            taylor=pruning.metric is Metric.taylor,
            active_channels=0 if moe.coactivation is None else moe.coactivation.active_channels,
            seed=seed,
            ranks=ranks,
        )

    def read(self, number: int) -> list[Group]:
        """Statistics of each group."""
        found = self._calibration.layer(number)
        if not self._halves:
            return [Group(statistics) for statistics in found]
        count = len(found) // 2
        return [Group(one, other) for one, other in zip(found[:count], found[count:], strict=True)]

    def skip(self, number: int) -> None:
        """Let the tokens pass."""
        self._calibration.skip(number)

    def leave(self, layer: ExpertLayer) -> None:
        """What the experts are changes nothing for the layers after it."""

    def keep(self, number: int) -> None:
        """Let the tokens pass."""
        self.skip(number)


class GivenStatistics:
    """Shows statistics of all layers that are there already, of :func:`dive.collect_statistics`."""

    def __init__(self, groups: Sequence[ChannelStatistics]) -> None:
        self._groups = groups

    def read(self, number: int) -> list[Group]:
        """Statistics of each group."""
        return [Group(statistics.layer(number)) for statistics in self._groups]

    def skip(self, number: int) -> None:
        """Nothing passes."""

    def leave(self, layer: ExpertLayer) -> None:
        """Nothing passes."""

    def keep(self, number: int) -> None:
        """Nothing passes."""


# ---------------------------------------------------------------------------------------------------------- from tokens


@dataclass(slots=True)
class LayerTokens:
    """All calibration tokens at one FFN, on the host; the vectors of all T tokens, the matrices of the t of this process."""

    inputs: Tensor
    """What it is given, (t, D) float32."""
    targets: Tensor
    """What it should return, (t, D)."""
    share: Share
    """Which tokens are this process's."""
    groups: Tensor | None = None
    """(T,) int64, the expert that each token begins with; none where the inputs themselves decide."""
    before: Tensor | None = None
    """(T,) int64, the expert that each token goes to in the layer before, where experts begin with clusters: their numbers
    mean nothing, and are made to stand for the same tokens in all layers as far as can be."""


class TokenWalk:
    """Shows the tokens themselves.

    With ``sequential`` two tracks of hidden states are kept: the dense model's, and that of the layers rebuilt so far. A
    layer learns from the second what the dense FFN makes of it, plus ``correction`` times what separates the two.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        groups: Sequence[Tensor],
        pruning: PruningConfig,
        moe: MoEConfig,
        *,
        batch: int,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            model: dense model.
            groups: calibration tokens (N, T) int64 of each group.
            batch: sequences per forward pass.
            seed: of what is sampled among the tokens.
            ranks: the processes that compute together.
        """
        assert moe.refined is not None
        settings, own = moe.refined, [part for group in shared_tokens(ranks, groups) for part in batches(group, batch)]
        self._share = Share.of_sequences(ranks, groups)
        self._model, self._moe, self._correction = model, moe, settings.correction
        self._dense = Track(model, own)
        self._rebuilt = Track(model, own) if settings.sequential else self._dense
        grouped = len(groups) > 1 and settings.start is None
        self._groups = (
            torch.cat([torch.full((group.numel(),), number) for number, group in enumerate(groups)])
            if grouped
            else None
        )
        self._clusters = moe.experts > 1 and not grouped and settings.start is not Start.random
        self._before: Tensor | None = None
        self._inputs = torch.empty(0)
        self._act: nn.Module = nn.Identity()

    def read(self, number: int) -> LayerTokens:
        """Inputs and targets of every token.

        Raises:
            UserError: they are not finite.
        """
        inputs, targets = self._meet(number, wanted=True)
        # Of all processes: one that ended alone would leave the others waiting.
        infinite = torch.tensor(float(not (inputs.isfinite().all() and targets.isfinite().all())))
        if self._share.ranks.sum(infinite) > 0:
            raise UserError(
                f"layer {number}: its FFN gets or makes what is not finite; set model.dtype=float32, or look at the weights"
            )
        return LayerTokens(inputs, targets, self._share, self._groups, self._before)

    def skip(self, number: int) -> None:
        """Let the tokens pass."""
        self._meet(number, wanted=False)

    def leave(self, layer: ExpertLayer) -> None:
        """The layers after it are given what the experts make of the tokens, as they are stored, where ``sequential``."""
        inputs = self._inputs
        if self._clusters:
            self._before = self._share.whole(likeliest_experts(layer, inputs))
        if self._rebuilt is not self._dense:
            stored = convert(layer, torch.float32, self._model.device)
            block = partial(layer_output, stored, self._act, top_k=self._moe.top_k, gates=self._moe.gates)
            self._rebuilt.add(_in_chunks(block, inputs, self._model.device))
        self._inputs = torch.empty(0)

    def keep(self, number: int) -> None:
        """Both tracks take what the dense FFN makes of their own."""
        inputs, _ = self._meet(number, wanted=False)
        if self._rebuilt is not self._dense:
            full = partial(dense_output, float32(ffn(self._model, number)))
            self._rebuilt.add(_in_chunks(full, inputs, self._model.device))
        self._inputs = torch.empty(0)

    def _meet(self, number: int, *, wanted: bool) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of the FFN, the latter without correction unless they are ``wanted``."""
        # Every tensor here is as long as all tokens together: at most four are alive beside the two tracks.
        weights = float32(ffn(self._model, number))
        full = partial(dense_output, weights)
        device, self._act = weights.down.device, weights.act
        inputs = torch.cat([rows.float().cpu() for rows in self._dense.attend(number)])
        targets = _in_chunks(full, inputs, device)
        if self._rebuilt is not self._dense:
            del inputs
            inputs = torch.cat([rows.float().cpu() for rows in self._rebuilt.attend(number)])
            apart = self._dense.states().sub_(self._rebuilt.states()).add_(targets) if wanted else None
            self._dense.add(targets)
            if apart is not None:
                targets = _in_chunks(full, inputs, device).lerp_(apart, self._correction)
        else:
            self._dense.add(targets)
        self._inputs = inputs
        return inputs, targets


def _in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor, device: torch.device) -> Tensor:
    """``function`` (T, D) to (T, D) on the device, of rows on the host, without a second copy of the result."""
    made = torch.empty_like(rows)
    for source, target in zip(rows.split(CHUNK), made.split(CHUNK), strict=True):
        target.copy_(function(source.to(device)))
    return made
