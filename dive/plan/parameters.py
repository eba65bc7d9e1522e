"""Parameters of the dense model and of its Mixture-of-Experts, from shapes.

Shapes: L layers, D hidden width, F FFN channels, W channels kept, E experts, R rank, Q and K widths of all query and all
key heads, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dive.config import (
    PARTS,
    ArchitectureConfig,
    Compensation,
    Config,
    Freezing,
    FreezingConfig,
    MoEConfig,
    StageConfig,
)
from dive.model.families import check_form, chosen_twin, form_of
from dive.retrain.training import idle_routers


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes that everything else is computed from."""

    layers: int
    kept: int
    """Layers that stay dense."""
    hidden: int
    channels: int
    width: int
    experts: int
    top_k: int
    renormalised: bool
    """Whether gates of chosen experts sum to one."""
    queries: int
    """Q"""
    keys: int
    """K"""
    vocabulary: int
    tied: bool
    head_norms: int
    """Weights of the norms on query and key heads, a layer."""
    dense_biases: int
    """Of queries, keys and values, a layer of the dense model."""
    qkv_biases: int
    """The same of the Mixture-of-Experts, which may have zeros there."""
    beside: int
    """Weights of a sparse block beside router and experts."""
    shared_width: int
    """Channels of the shared expert, 0 if there is none."""
    noise: bool
    """Whether routers have noise weights in training."""
    bias: bool
    """Whether experts have FLAP's bias."""
    rank: int

    @property
    def sparse(self) -> int:
        """Layers with experts."""
        return self.layers - self.kept

    @property
    def attention(self) -> int:
        """Weights of one layer's projections."""
        return 2 * self.hidden * (self.queries + self.keys)

    @property
    def ffn(self) -> int:
        """Weights of one layer's dense FFN."""
        return 3 * self.hidden * self.channels

    @property
    def expert(self) -> int:
        """Weights of one expert of one layer, without bias."""
        return 3 * self.hidden * self.width

    @property
    def shared_expert(self) -> int:
        """Weights of the shared expert of one layer, without its gate; 0 if there is none."""
        return 3 * self.hidden * self.shared_width

    @property
    def tied_head(self) -> int:
        """Numbers that an export has twice: of a tied head."""
        return self.vocabulary * self.hidden if self.tied else 0

    @property
    def norms(self) -> int:
        """Weights of one layer's norms."""
        return 2 * self.hidden + self.head_norms

    @property
    def shared(self) -> int:
        """Everything but FFNs, sparse blocks and biases."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.hidden + self.layers * (self.attention + self.norms)

    @property
    def dense(self) -> int:
        """Parameters of the dense model."""
        return self.shared + self.layers * (self.dense_biases + self.ffn)

    @property
    def total(self) -> int:
        """Parameters of the Mixture-of-Experts as a stock class has them; ``results.json`` gives this number."""
        return self._always + self.sparse * self.experts * self.expert

    @property
    def router(self) -> int:
        """Weights of one layer's router, without noise weights."""
        return self.experts * self.hidden

    @property
    def active(self) -> int:
        """Of these, the parameters that one token meets: everything but the experts, and ``top_k`` of them."""
        return self._always + self.sparse * self.top_k * self.expert

    @property
    def _always(self) -> int:
        """Parameters of the Mixture-of-Experts that are no expert's."""
        kept = self.kept * self.ffn
        return self.shared + self.layers * self.qkv_biases + self.sparse * (self.router + self.beside) + kept

    @property
    def noise_weights(self) -> int:
        """What the routers have beside in training (``retrain.noise``)."""
        return self.sparse * self.router if self.noise else 0

    @property
    def biases(self) -> int:
        """What the experts have beside with ``pruning.compensation=bias``, and in that export."""
        return self.sparse * self.router if self.bias else 0

    @property
    def expert_adapters(self) -> int:
        """LoRA weights of one expert of one layer: A and B on gate, up and down."""
        return 3 * self.rank * (self.hidden + self.width)

    @property
    def shared_adapters(self) -> int:
        """The same of the shared one."""
        return 3 * self.rank * (self.hidden + self.shared_width) if self.shared_width else 0


def shapes(architecture: ArchitectureConfig, config: Config, moe: MoEConfig | None = None) -> Shapes:
    """Sizes of a configuration.

    Args:
        moe: in place of the configuration's own.

    Raises:
        UserError: the pruning ratio leaves no channel, or all; or the model cannot become ``model.twin``.
    """
    moe = moe or config.moe
    kind = architecture.model_type
    twin, form = chosen_twin(kind, config.model.twin), form_of(config, kind)
    check_form(form, kind, layers=architecture.num_hidden_layers)
    width, shared = moe.widths(config.pruning, architecture.intermediate_size)
    queries = architecture.num_attention_heads * architecture.head_dim
    keys = architecture.num_key_value_heads * architecture.head_dim
    return Shapes(
        layers=architecture.num_hidden_layers,
        kept=len(form.dense_layers),
        hidden=architecture.hidden_size,
        channels=architecture.intermediate_size,
        width=width,
        experts=moe.experts,
        top_k=moe.top_k,
        renormalised=not moe.scales,
        queries=queries,
        keys=keys,
        vocabulary=architecture.vocab_size,
        tied=architecture.tie_word_embeddings,
        head_norms=twin.head_norms(architecture),
        dense_biases=queries + 2 * keys if architecture.model_type in twin.biased else 0,
        qkv_biases=queries + 2 * keys if twin.qkv_bias else 0,
        beside=twin.weights_beside_experts(architecture, shared=shared),
        shared_width=shared,
        noise=config.retrain.noise > 0,
        bias=config.pruning.compensation is Compensation.bias,
        rank=config.retrain.lora.rank,
    )


def full_sizes(s: Shapes) -> dict[str, int]:
    """{part of the freezing policy: its parameters in training}, adapters apart; FLAP's biases are never trained."""
    return {
        "router": s.sparse * s.router + s.noise_weights,
        "experts": s.sparse * (s.experts * s.expert + s.shared_expert),
        "norms": s.layers * s.norms + s.hidden,
        "attention": s.layers * (s.attention + s.qkv_biases),
        "embeddings": s.vocabulary * s.hidden,
        "head": 0 if s.tied else s.vocabulary * s.hidden,
    }


def adapter_sizes(s: Shapes) -> dict[str, int]:
    """{part: parameters of its low-rank adapters}."""
    linear = 2 * (s.hidden + s.queries) + 2 * (s.hidden + s.keys)
    return {
        "experts": s.sparse * (s.experts * s.expert_adapters + s.shared_adapters),
        "attention": s.layers * s.rank * linear,
        "embeddings": s.rank * (s.vocabulary + s.hidden),
        "head": s.rank * (s.vocabulary + s.hidden),
    }


def trained(s: Shapes, policies: Iterable[FreezingConfig]) -> dict[str, int]:
    """{tensors: how many of them} that have gradients and Adam's states in any of these stages.

    ``part`` is one trained in full, ``part.lora`` its adapters.
    """
    full, adapters = full_sizes(s), adapter_sizes(s)
    found: dict[str, int] = {}
    for policy in policies:
        for part in PARTS:
            choice: Freezing = getattr(policy, part)
            if choice is Freezing.full:
                found[part] = full[part]
            elif choice is Freezing.lora:
                found[f"{part}.lora"] = adapters[part]
    return found


def reached(s: Shapes, stages: Iterable[StageConfig]) -> int:
    """Parameters that any of these stages trains; routers that no gradient reaches do not count."""
    found: dict[str, int] = {}
    for stage in stages:
        of_stage = trained(s, [stage.train])
        if idle_routers(stage, experts=s.experts, top_k=s.top_k, renormalised=s.renormalised) is not None:
            of_stage.pop("router", None)
        found |= of_stage
    return sum(found.values())
