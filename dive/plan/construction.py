"""What building the experts costs: second moments, least squares, routers, refinement. One layer at a time.

Shapes: D hidden width, F FFN channels, W channels kept, E experts, G groups, N calibration tokens.
"""

from dataclasses import dataclass

from dive.config import Config, DistillationConfig
from dive.plan import flops
from dive.plan.parameters import Shapes


@dataclass(frozen=True, slots=True)
class Refinement:
    """Derivations of the experts, each from the tokens that chose them, then gradient steps."""

    derivations: int
    steps: int
    batch: int
    """Tokens a step."""
    active: int
    """Experts a token meets in these steps."""


def refinement(config: Config) -> Refinement | None:
    """``moe.refined`` of a configuration that has it; several experts are derived once more than there are rounds."""
    found = config.moe.refined
    if found is None:
        return None
    several = config.moe.experts > 1
    rounds, active = (found.rounds, max(config.moe.top_k, 2)) if several else (0, 1)
    return Refinement(derivations=rounds + 1, steps=found.steps, batch=found.batch, active=active)


def moments(s: Shapes, tokens: int) -> int:
    """FLOPs of the F × F second moments of N tokens (float32)."""
    return 2 * tokens * s.channels**2


def solve(s: Shapes) -> int:
    """FLOPs of one expert's least squares (float64): W G_S, Cholesky factor, two triangular solves."""
    return 2 * s.hidden * s.channels * s.width + s.width**3 // 3 + 2 * s.hidden * s.width**2


def eliminate(s: Shapes) -> int:
    """FLOPs of choosing one expert's channels by elimination (float64): factor and inverse, weights, updates of both."""
    f, d, gone = s.channels, s.hidden, s.channels - s.width
    return f**3 + 2 * d * f**2 + 2 * gone * (f**2 + d * f)


def eliminate_moved(s: Shapes, block: int) -> int:
    """Bytes that these updates read and write: the inverse and the weights, and products as large, once a block."""
    updates = -(-(s.channels - s.width) // block)
    return updates * 4 * 8 * (s.channels**2 + s.hidden * s.channels)


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
    errors = tokens * (2 * s.ffn + 2 * s.experts * s.expert)
    return errors + settings.steps * min(settings.batch, tokens) * 4 * s.router


def router_fit_moved(s: Shapes, settings: DistillationConfig, tokens: int) -> int:
    """Bytes that its steps gather from all sampled rows, and read again twice."""
    return settings.steps * min(settings.batch, tokens) * s.hidden * 4 * 4


def refine(s: Shapes, settings: Refinement, tokens: int, length: int) -> int:
    """FLOPs of one layer's refinement, without the solves of :func:`refine_solves`.

    Channels, second moments and cross moments of each expert's own tokens, each time; gradient steps; the dense FFN's targets
    of both tracks, attention of the second, and the rebuilt layer's forward pass, whose output feeds the next. Routers are fitted
    beside (:func:`router_fit`).
    """
    channels = tokens * 2 * (s.ffn - s.hidden * s.channels)  # gate and up
    steps = settings.steps * settings.batch * 3 * 2 * settings.active * s.expert
    cross = tokens * 2 * s.hidden * s.channels
    prefix = tokens * (flops.sparse_layer(s, length, active=s.top_k) + 2 * s.ffn)
    return settings.derivations * (channels + cross + moments(s, tokens)) + steps + prefix


def refine_solves(s: Shapes, settings: Refinement) -> int:
    """FLOPs of the least squares of one layer's refinement (float64)."""
    return settings.derivations * s.experts * solve(s)


def refine_host_bytes(s: Shapes, tokens: int, weight: int) -> int:
    """Four of inputs, targets and what they are computed from (float32), and the rebuilt prefix's hidden states, of all tokens.

    The dense model's hidden states are counted with the model.

    Args:
        weight: bytes of a hidden state's element.
    """
    return tokens * s.hidden * (4 * 4 + weight)


def refine_device_bytes(s: Shapes, settings: Refinement) -> int:
    """What deriving an expert holds, or the gradient steps: experts, gradients and Adam's states in float32."""
    activations = settings.batch * settings.active * (4 * s.width + 3 * s.hidden) * 4
    return max(2 * moment_bytes(s) + eliminate_bytes(s), s.experts * s.expert * 16 + activations)
