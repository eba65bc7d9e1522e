"""What every twin has in common: it and its dense model are built like Llama, and a file of its own says where they differ.

Neither torch nor transformers is imported here or beside: the plan asks a twin for its figures without them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from dive.config import AUTO, ArchitectureConfig, Gates
from dive.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

UNTRAINED = "ffn"
"""Part of a twin that the freezing policy does not speak of: no stage trains it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a run chooses of a Mixture-of-Experts beside the number and the sizes of its experts."""

    twin: str = AUTO
    """Its class, see :class:`dive.config.ModelConfig`. A run's has its name, so that nothing is made twice for ``auto``."""
    gates: Gates = Gates.renormalised
    dense_layers: tuple[int, ...] = ()
    """Layers that have no experts but the dense model's own FFN."""
    shares: bool = False
    """Whether there is a shared expert."""

    @property
    def stated_layers(self) -> str:
        """The override of the dense layers."""
        return f"moe.dense_layers={list(self.dense_layers)}".replace(" ", "")

    def of_one_expert(self) -> "Form":
        """The same of one pruned expert: its gate is 1 in every class, and nothing is shared."""
        return replace(self, gates=Gates.renormalised, shares=False)


@dataclass(frozen=True, slots=True)
class Unserved:
    """Engines that do not serve a model rightly, and what is said of it."""

    engines: tuple[str, ...]
    """Among ``vLLM``, ``SGLang`` and ``llama.cpp``."""
    said: str
    """A sentence or two."""


class Twin(ABC):
    """A stock Mixture-of-Experts class and the dense models that become it.

    Places are dotted names of modules, in the dense model and in the twin alike. The output of an FFN is added to the hidden
    states as it is, see :class:`dive.model.layers.Track`: a norm after it takes more than a file here.
    """

    name: ClassVar[str]
    """``model_type`` of the Mixture-of-Experts."""
    dense: ClassVar[tuple[str, ...]]
    """``model_type`` of the dense models that become it."""
    head_dim: ClassVar[int | None] = None
    """Width of a head where config.json leaves it out; hidden width / heads if none."""
    plain: ClassVar[bool] = False
    """Whether its gates are always renormalised, and every layer has experts."""
    llama_cpp_gates: ClassVar[Gates | None] = None
    """Gates that llama.cpp gives the class; its own choice if none."""
    shared: ClassVar[bool] = False
    """Whether it has a place for a shared expert."""
    qkv_bias: ClassVar[bool] = False
    """Whether queries, keys and values have biases: the dense model's, or zeros."""
    biased: ClassVar[tuple[str, ...]] = ()
    """``model_type`` of the dense models that have such biases."""
    in_gguf: ClassVar[dict[str, bool]]
    """{``general.architecture`` of GGUF files that hold a dense model of this ``model_type``: whether neighbouring rows of query
    and key projections are the pairs that RoPE turns, which in transformers are half a head apart}"""

    embeddings: ClassVar[str] = "model.embed_tokens"
    layers: ClassVar[str] = "model.layers"
    rotary: ClassVar[str] = "model.rotary_emb"
    norm: ClassVar[str] = "model.norm"
    """The last one, before the head."""
    head: ClassVar[str] = "lm_head"

    attention: ClassVar[str] = "self_attn"
    """In a layer."""
    ffn: ClassVar[str] = "mlp"
    """In a layer of the dense model."""
    projections: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    """Gate, up and down in the dense FFN."""
    activation: ClassVar[str] = "act_fn"
    """In the dense FFN."""
    block: ClassVar[str] = "mlp"
    """In a layer of the twin: the sparse block, which has ``gate`` (router) and ``experts`` (fused 3-D weights)."""

    block_on_disk: ClassVar[str] = "mlp"
    """The sparse block in a checkpoint."""
    experts_on_disk: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    """Gate, up and down of one expert in a checkpoint."""

    carried: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
        "attention_dropout",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "sliding_window",
        "dtype",
    )
    """What the twin's configuration takes over from the dense model's, where that has it."""

    @abstractmethod
    def config(
        self, dense: "PretrainedConfig", *, width: int, experts: int, top_k: int, shared: int, form: Form
    ) -> "PretrainedConfig":
        """The stock configuration with ``experts`` FFNs of ``width`` channels and a shared one of ``shared``.

        :meth:`settings` gives most of it.
        """

    @abstractmethod
    def model_class(self) -> type["PreTrainedModel"]:
        """The stock class."""

    def settings(self, dense: "PretrainedConfig", *, top_k: int) -> dict[str, Any]:
        """Arguments that every twin's configuration has."""
        carried = {name: getattr(dense, name) for name in self.carried if hasattr(dense, name)}
        return carried | {"num_experts_per_tok": top_k, "use_cache": True, "output_router_logits": False}

    def check(self, config: "PretrainedConfig", path: str) -> None:
        """Refuse a dense model that has what the stock class has no place for.

        Raises:
            UserError: it has biases, or sliding windows in some layers only.
        """
        for name in ("attention_bias", "mlp_bias"):
            if getattr(config, name, False):
                raise UserError(
                    f"model.path={path}: {name}=true has no place in a stock Mixture-of-Experts class; choose another model"
                )
        if len(set(getattr(config, "layer_types", None) or ())) > 1:
            raise UserError(
                f"model.path={path}: sliding windows in some layers only have no place in a stock Mixture-of-Experts class; "
                "choose another model"
            )

    def lacks(self, form: Form) -> tuple[str, str] | None:
        """What of a choice the stock class has no place for, and the override that takes it back; none if it has all."""
        if self.plain and form.gates is not Gates.renormalised:
            said = f"moe.gates={form.gates.value} has no place in {self.name}, which renormalises its gates"
            return said, f"moe.gates={Gates.renormalised.value}"
        if form.shares and not self.shared:
            return f"moe.shared_expert has no place in {self.name}", "moe.shared_expert=0"
        if self.plain and form.dense_layers:
            return (
                f"{form.stated_layers} has no place in {self.name}, whose layers all have experts",
                "moe.dense_layers=[]",
            )
        return None

    def unserved(self, form: Form, dense: "PretrainedConfig", *, experts: int) -> list[Unserved]:
        """Engines that load such a model and answer otherwise, or do not load it, see docs/serving.md.

        Args:
            dense: configuration of the dense model; the twin's own says the same of it.
            experts: of each layer; a single one's gate is 1 in every class.
        """
        found = []
        llama_cpp = ("llama.cpp",)
        if experts > 1 and self.llama_cpp_gates not in (None, form.gates):
            said = "renormalises" if self.llama_cpp_gates is Gates.renormalised else "does not renormalise"
            said = f"llama.cpp {said} the gates of this class whatever `config.json` says: it gives other answers."
            found.append(Unserved(llama_cpp, said))
        if form.dense_layers:
            found.append(Unserved(llama_cpp, "llama.cpp knows no dense layers in this class."))
        return found

    def sparse_layers(self, config: "PretrainedConfig") -> list[int]:
        """Numbers of the layers that have experts, in a twin of this configuration."""
        dense, every = set(getattr(config, "mlp_only_layers", None) or ()), getattr(config, "decoder_sparse_step", 1)
        return [n for n in range(config.num_hidden_layers) if n not in dense and (n + 1) % every == 0]

    def is_inherited(self, config: "PretrainedConfig", parameter: str) -> bool:
        """Whether the twin has a parameter from its dense model, from its name in ``named_parameters``."""
        if f".{self.block}." not in parameter:
            return True
        number = parameter.removeprefix(f"{self.layers}.").partition(".")[0]
        return int(number) not in self.sparse_layers(config)

    def is_zero_at_first(self, parameter: str) -> bool:
        """Whether a parameter of the twin outside its sparse blocks is zero where the dense model has none of this name."""
        return self.qkv_bias and parameter.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))

    def beside_experts(self, config: "PretrainedConfig", shared: "tuple[Tensor, Tensor] | None") -> dict[str, "Tensor"]:
        """{name in a sparse block: tensor} of what it has beside router and experts, in memory and on disk alike.

        Args:
            shared: gate and up (2 S, D) and down (D, S) of the shared expert, if there is one.
        """
        return {}

    def weights_beside_experts(self, architecture: ArchitectureConfig, *, shared: int) -> int:
        """How many numbers these are."""
        return 0

    def shared_projections(self, config: "PretrainedConfig") -> tuple[str, ...]:
        """Names in a sparse block of the linear maps of the shared expert; none where it adds nothing."""
        return ()

    def spare(self, *, tied: bool) -> tuple[str, ...]:
        """How names end of tensors that a checkpoint may hold without the model having a place for them.

        The frequencies that old checkpoints hold are computed by the model, and a tied head may stand there as a copy of the
        embedding.
        """
        frequencies = f"{self.rotary.rpartition('.')[2]}.inv_freq"
        return (frequencies, f"{self.head}.weight") if tied else (frequencies,)

    def part_of(self, config: "PretrainedConfig", parameter: str) -> str:
        """Part of the freezing policy that a parameter of the twin belongs to, from its name in ``named_parameters``.

        Raises:
            ValueError: none.
        """
        of_experts = ("experts", *self.shared_projections(config))
        if any(f".{self.block}.{name}." in parameter for name in of_experts):
            return "experts"
        if f".{self.block}.gate." in parameter:
            return "router"
        if f".{self.block}." in parameter:
            return UNTRAINED
        if f".{self.attention}." in parameter and "norm" not in parameter:
            return "attention"
        if "norm" in parameter:
            return "norms"
        if parameter.startswith(f"{self.embeddings}."):
            return "embeddings"
        if parameter.startswith(f"{self.head}."):
            return "head"
        raise ValueError(f"parameter {parameter} belongs to no part")

    def head_norms(self, architecture: ArchitectureConfig) -> int:
        """Weights of one layer's norms on query and key heads."""
        return 0

    def earlier_names(self, config: dict[str, Any]) -> dict[str, Any]:
        """What config.json says anew under names of earlier releases of transformers, for this twin alone."""
        return {}
