"""Floating-point operations of the model's passes, a multiplication and an addition counted as two.

Matrix products alone, and attention over all T × T pairs, as kernels without a causal short cut do it. Norms, activations, RoPE
and the loss are left out: together a few per cent of a layer whose width is in the thousands.

Shapes: L layers, D hidden width, F FFN channels, W channels kept, E experts, V vocabulary, T tokens of a sequence.
"""

from dive.config import PARTS, Freezing, StageConfig
from dive.plan.parameters import Shapes


def attention(s: Shapes, length: int) -> int:
    """Of one layer, a token: projections, scores and their product with the values."""
    return 2 * s.attention + scores(s, length)


def scores(s: Shapes, length: int) -> int:
    """Of one layer, a token: queries times keys, and weights times values."""
    return 4 * length * s.queries


def dense_layer(s: Shapes, length: int) -> int:
    """Of one decoder layer of the dense model, a token."""
    return attention(s, length) + 2 * s.ffn


def sparse_layer(s: Shapes, length: int, *, active: int) -> int:
    """Of one decoder layer of the Mixture-of-Experts with ``active`` experts, a token."""
    return attention(s, length) + 2 * s.router + 2 * s.beside + 2 * active * s.expert


def head(s: Shapes) -> int:
    """Of the language-model head, a token."""
    return 2 * s.vocabulary * s.hidden


def dense_forward(s: Shapes, length: int) -> int:
    """Of the dense model, a token."""
    return s.layers * dense_layer(s, length) + head(s)


def sparse_forward(s: Shapes, length: int, *, active: int) -> int:
    """Of the Mixture-of-Experts, a token."""
    return s.sparse * sparse_layer(s, length, active=active) + s.kept * dense_layer(s, length) + head(s)


def training(s: Shapes, stage: StageConfig, length: int, *, checkpointing: bool) -> int:
    """Of forward and backward pass of a stage of retraining, a token, without the dense teacher.

    The backward pass takes the gradients of activations down to the lowest trained tensor, and those of the trained weights;
    frozen weights have none.
    """
    active = stage.active(experts=s.experts, top_k=s.top_k)
    chosen: dict[str, Freezing] = {part: getattr(stage.train, part) for part in PARTS}
    full = {
        "router": s.sparse * _routers(s),
        "experts": s.sparse * (active * s.expert + s.shared_expert),
        "attention": s.layers * s.attention,
        "head": s.vocabulary * s.hidden,
    }
    adapters = {
        "experts": s.sparse * (active * s.expert_adapters + s.shared_adapters),
        "attention": s.layers * 2 * s.rank * (2 * s.hidden + s.queries + s.keys),
        "embeddings": s.rank * s.hidden,  # A is looked up
        "head": s.rank * (s.vocabulary + s.hidden),
    }
    adapted = {part: adapters[part] for part, choice in chosen.items() if choice is Freezing.lora}
    forward = sparse_forward(s, length, active=active) + 2 * s.noise_weights + 2 * sum(adapted.values())
    backward = 4 * sum(adapted.values())
    backward += sum(2 * full.get(part, 0) for part, choice in chosen.items() if choice is Freezing.full)
    if any(choice is not Freezing.frozen for part, choice in chosen.items() if part != "head"):
        experts = s.sparse * (2 * _routers(s) + 2 * s.beside + 2 * active * s.expert) + s.kept * 2 * s.ffn
        backward += (
            s.layers * (2 * s.attention + 2 * scores(s, length)) + experts - _below(s, chosen, length, active) + head(s)
        )
        if checkpointing:
            forward += forward - head(s)
    return forward + backward


def _routers(s: Shapes) -> int:
    """Weights of one layer's router in training."""
    return s.router * (2 if s.noise else 1)


def _below(s: Shapes, chosen: dict[str, Freezing], length: int, active: int) -> int:
    """What the first layer's backward pass saves, a token, where nothing below it is trained."""
    trained = {part for part, choice in chosen.items() if choice is not Freezing.frozen}
    if trained & {"embeddings", "norms"}:
        return 0
    if "attention" in trained:
        return 2 * s.hidden * (s.queries + 2 * s.keys)
    of_attention = 2 * s.attention + 2 * scores(s, length)
    if "experts" in trained:
        return of_attention + 2 * _routers(s) + 4 * active * s.hidden * s.width
    return of_attention + 2 * _routers(s) + 2 * active * s.expert
