"""What building the experts costs: second moments, least squares, routers, refinement. One layer at a time.

Shapes: D hidden width, F FFN channels, W channels kept, E experts, G groups, N calibration tokens.
"""

import math
from dataclasses import dataclass

from dive.config import Config, DistillationConfig
from dive.plan import flops
from dive.plan.parameters import Shapes

ROUND_TOKENS = 4
"""Tokens a channel of an expert that all derivations but the last take, see :mod:`dive.moe.constructions.refined`."""
KMEANS_TOKENS, KMEANS_ROUNDS = 32768, 10
"""Tokens of a layer that k-means takes at most, and its rounds, see :mod:`dive.moe.clustering`."""
PAIRS = 1.2
"""Measured: a token's second expert is left out of a local step where the router all but excludes it."""


@dataclass(frozen=True, slots=True)
class Refinement:
    """Derivations of the experts, each from the tokens that chose them, then gradient steps."""

    derivations: int
    steps: int
    batch: int
    """Tokens a step."""
    active: int
    """Experts a token may meet in these steps."""
    pairs: float
    """Experts that it meets on average."""


def refinement(config: Config) -> Refinement | None:
    """``moe.refined`` of a configuration that has it; several experts are derived once more than there are rounds."""
    found = config.moe.refined
    if found is None:
        return None
    several = config.moe.experts > 1
    rounds, active = (found.rounds, max(config.moe.top_k, 2)) if several else (0, 1)
    pairs = PAIRS if several and config.moe.top_k == 1 else float(active)
    return Refinement(derivations=rounds + 1, steps=found.steps, batch=found.batch, active=active, pairs=pairs)


def moments(s: Shapes, tokens: int) -> int:
    """FLOPs of the F × F second moments of N tokens (float32): what lies above the diagonal, in eight strips."""
    return tokens * s.channels**2 * 9 // 8


def eliminate(s: Shapes) -> int:
    """FLOPs of choosing one expert's channels by elimination (float64): inverse and refit of all, then of ever fewer."""
    f, w, d = s.channels, s.width, s.hidden
    return f**3 + 2 * d * f**2 + 2 * (f**3 - w**3) // 3 + d * (f**2 - w**2)


def solve(s: Shapes) -> int:
    """FLOPs of one expert's least squares (float64): W G_S, Cholesky factor, two triangular solves."""
    return 2 * s.hidden * s.channels * s.width + s.width**3 // 3 + 2 * s.hidden * s.width**2


def eliminate_bytes(s: Shapes) -> int:
    """What they hold (float64): moments, factor, inverse and its update; weights and theirs."""
    return 8 * (4 * s.channels**2 + 2 * s.hidden * s.channels)


def moment_bytes(s: Shapes) -> int:
    """One group's second moments (float32)."""
    return 4 * s.channels**2


def solve_bytes(s: Shapes) -> int:
    """What one expert's least squares holds at its peak (float64): moments, weights, rows and columns of the kept channels."""
    f, w, d = s.channels, s.width, s.hidden
    return 8 * (f * f + d * f + w * w + f * w + d * w)


def router_fit(s: Shapes, settings: DistillationConfig, tokens: int) -> int:
    """FLOPs of one router: errors of every expert on the sampled tokens, then the fit."""
    errors = tokens * 2 * s.experts * s.expert
    return errors + settings.steps * min(settings.batch, tokens) * 4 * s.router


def refine(s: Shapes, settings: Refinement, router: DistillationConfig, tokens: int, length: int) -> float:
    """FLOPs of one layer's refinement, without :func:`refine_solves` and the dense layer's own forward pass.

    For each derivation channels, second moments and targets' products with the channels of each expert's own tokens (all
    derivations but the last take so many at most), and the router; gradient steps, whose backward pass needs no gradient of
    the inputs; and of the rebuilt prefix the dense FFN, for the target, and the sparse layer, whose output feeds the next.
    """
    first = min(tokens, s.experts * ROUND_TOKENS * s.channels)
    derived = tokens * 2 * s.ffn + moments(s, tokens)
    derived += (settings.derivations - 1) * (first * 2 * s.ffn + moments(s, first))
    if s.experts > 1:
        derived += settings.derivations * router_fit(s, router, min(router.tokens, tokens))
    steps = settings.steps * settings.batch * settings.pairs * 14 * s.hidden * s.width
    prefix = tokens * (2 * s.ffn + flops.sparse_layer(s, length, active=s.top_k))
    return derived + steps + prefix


def refine_solves(s: Shapes, settings: Refinement, *, eliminates: bool) -> int:
    """FLOPs of the elimination, where channels are chosen by it, and least squares of one layer's refinement (float64)."""
    return settings.derivations * s.experts * (solve(s) + (eliminate(s) if eliminates else 0))


def kmeans(s: Shapes, tokens: int) -> int:
    """FLOPs of k-means on one layer's inputs (float32): rows times a few candidates for each centre, in each round rows times
    centres and sums of rows."""
    candidates = 1 + (s.experts - 1) * (2 + int(math.log(s.experts)))
    return min(tokens, KMEANS_TOKENS) * 2 * s.hidden * (candidates + 2 * s.experts * KMEANS_ROUNDS)


def kmeans_moved(s: Shapes, tokens: int) -> int:
    """Bytes that it reads in the device's memory, of which it makes less than a GPU could: rows once for each product, and to
    centre them (read, written, squared)."""
    return kmeans_sample(s, tokens) * (3 + s.experts + 2 * KMEANS_ROUNDS)


def kmeans_sample(s: Shapes, tokens: int) -> int:
    """Bytes of the rows (float32) that go to the device for it; it has as many again of its own."""
    return min(tokens, KMEANS_TOKENS) * s.hidden * 4


def refine_host_bytes(s: Shapes, tokens: int, weight: int) -> int:
    """Four of inputs, targets and what they are computed from (float32), and the rebuilt prefix's hidden states, of all tokens.

    The dense model's hidden states are counted with the model.

    Args:
        weight: bytes of a hidden state's element.
    """
    return tokens * s.hidden * (4 * 4 + weight)


def refine_device_bytes(s: Shapes, settings: Refinement) -> int:
    """What deriving an expert holds, or the gradient steps: experts before and after, gradients and Adam's states in float32.

    With K > 1 all experts are stacked in each step, which takes a copy of them more.
    """
    activations = settings.batch * settings.active * (4 * s.width + 3 * s.hidden) * 4
    return max(
        2 * moment_bytes(s) + eliminate_bytes(s), s.experts * s.expert * (24 if s.top_k == 1 else 28) + activations
    )
