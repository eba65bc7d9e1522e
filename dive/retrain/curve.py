"""What every optimiser step of a stage leaves behind, and the points of a curve that are made of it.

Shapes: S steps, L layers, E experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Curve:
    """One entry a step, so that points at any interval can be made of it later."""

    loss: list[float] = field(default_factory=list)
    """Mean negative log-likelihood of the text, nats a token; every step has equally many tokens."""
    learning_rate: list[float] = field(default_factory=list)
    """That the step was taken with."""
    seconds: list[float] = field(default_factory=list)
    """From the end of the step before."""
    load: list[Tensor] = field(default_factory=list)
    """(L, E) float32, share of each expert in its layer's load."""
    entropy: list[Tensor] = field(default_factory=list)
    """(L,) float32, mean entropy of the gate in nats."""
    layers: list[int] | None = None
    """Numbers of the L layers with routers; from 0 on if none."""

    def __len__(self) -> int:
        return len(self.loss)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Curve":
        """The inverse of :meth:`tensors`."""
        return cls(
            loss=tensors["loss"].tolist(),
            learning_rate=tensors["learning_rate"].tolist(),
            seconds=tensors["seconds"].tolist(),
            load=list(tensors["load"]),
            entropy=list(tensors["entropy"]),
            layers=tensors["layers"].tolist() if "layers" in tensors else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """For files: loss, learning_rate and seconds (S,) float64, load (S, L, E) and entropy (S, L) float32, layers (L,)."""
        columns = {"loss": self.loss, "learning_rate": self.learning_rate, "seconds": self.seconds}
        found = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
        for name, rows in (("load", self.load), ("entropy", self.entropy)):
            found[name] = torch.stack(rows) if rows else torch.zeros(0)
        if self.layers is not None:
            found["layers"] = torch.tensor(self.layers)
        return found

    def point(self, every: int, *, tokens: int) -> dict[str, float]:
        """The latest point: means over the steps since the last multiple of ``every``.

        Args:
            every: steps between points.
            tokens: of a step.
        """
        return self._point((len(self) - 1) // every * every, len(self), tokens)

    def points(self, every: int, *, tokens: int, steps: int) -> list[dict[str, float]]:
        """Every point so far of a stage of ``steps`` steps: at the multiples of ``every`` and at the end."""
        ends = [end for end in range(1, len(self) + 1) if end % every == 0 or end == steps]
        return [self._point((end - 1) // every * every, end, tokens) for end in ends]

    def _point(self, start: int, end: int, tokens: int) -> dict[str, float]:
        count = end - start
        loss = sum(self.loss[start:end]) / count
        values = {
            "step": float(end),
            "tokens": float(end * tokens),
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "learning_rate": self.learning_rate[end - 1],
            "tokens_per_second": tokens * count / sum(self.seconds[start:end]),
        }
        load = torch.stack(self.load[start:end]).double().mean(dim=0).tolist()
        entropy = torch.stack(self.entropy[start:end]).double().mean(dim=0).tolist()
        for number, shares, nats in zip(self.layers or range(len(load)), load, entropy, strict=True):
            values[f"router_entropy/layer_{number:02d}"] = nats
            values |= {f"expert_load/layer_{number:02d}/expert_{e}": share for e, share in enumerate(shares)}
        return values
