"""Where each model family keeps its FFNs, and what its Mixture-of-Experts twin is called.

Nothing outside this file and :mod:`dive.model.architecture` knows how a family is built.

Shapes: L layers, D hidden width, F FFN channels of the dense model, W channels kept, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dive.errors import UserError
from dive.model.architecture import check_family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TWINS = ("mixtral", "qwen3_moe")
"""``model_type`` of what the supported families become."""


def check_supported(config: "PretrainedConfig", path: str) -> None:
    """Raise :class:`UserError` if the model at ``path`` has no Mixture-of-Experts twin among the stock classes."""
    check_family(config.model_type, path)
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


def moe_config(dense: "PretrainedConfig", *, width: int, experts: int, top_k: int) -> "PretrainedConfig":
    """The stock configuration of the twin: everything of ``dense``, with ``experts`` FFNs of ``width`` channels.

    Llama and Mistral become Mixtral, Qwen3 becomes Qwen3-MoE with renormalised gates. Grouped-query attention, tied
    embeddings and RoPE scaling are carried over.
    """
    from transformers import MixtralConfig, Qwen3MoeConfig

    shared: dict[str, Any] = {
        name: getattr(dense, name)
        for name in (
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
        if hasattr(dense, name)
    }
    shared.update(num_experts_per_tok=top_k, use_cache=True)
    if dense.model_type == "qwen3":
        return Qwen3MoeConfig(
            **shared,
            num_experts=experts,
            moe_intermediate_size=width,
            intermediate_size=dense.intermediate_size,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            use_sliding_window="sliding_attention" in dense.layer_types,
            output_router_logits=False,
        )
    return MixtralConfig(**shared, num_local_experts=experts, intermediate_size=width, output_router_logits=False)


def moe_class(config: "PretrainedConfig") -> type["PreTrainedModel"]:
    """The stock model class of a configuration made by :func:`moe_config`."""
    from transformers import MixtralForCausalLM, Qwen3MoeForCausalLM

    stock: type[PreTrainedModel] = Qwen3MoeForCausalLM if config.model_type == "qwen3_moe" else MixtralForCausalLM
    return stock


@dataclass(slots=True)
class FFN:
    """One gated FFN: ``down @ (act(gate @ x) * (up @ x))``."""

    gate: Tensor
    """(F, D)"""
    up: Tensor
    """(F, D)"""
    down: Tensor
    """(D, F)"""
    act: nn.Module

    def channels(self, inputs: Tensor) -> Tensor:
        """Input of ``down_proj``: (..., D) to (..., F)."""
        product: Tensor = self.act(inputs @ self.gate.T) * (inputs @ self.up.T)
        return product


def decoder_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """The decoder layers of a dense model or its twin."""
    layers = model.model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def ffn(model: "PreTrainedModel", layer: int) -> FFN:
    """Weights of the dense FFN of one layer (views, not copies)."""
    mlp: Any = decoder_layers(model)[layer].mlp
    return FFN(
        gate=mlp.gate_proj.weight.detach(),
        up=mlp.up_proj.weight.detach(),
        down=mlp.down_proj.weight.detach(),
        act=mlp.act_fn,
    )


def ffn_modules(model: "PreTrainedModel", layer: int) -> tuple[nn.Module, nn.Module]:
    """(the dense FFN, its ``down_proj``) of one layer, for hooks."""
    mlp: Any = decoder_layers(model)[layer].mlp
    return mlp, mlp.down_proj


def ffn_projections(model: "PreTrainedModel", layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(``gate_proj``, ``up_proj``, ``down_proj``) of one layer of the dense model, for hooks."""
    mlp: Any = decoder_layers(model)[layer].mlp
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def moe_block(model: "PreTrainedModel", layer: int) -> Any:
    """The sparse block of one layer of a twin: it has ``gate`` (router) and ``experts`` (fused 3-D weights)."""
    return decoder_layers(model)[layer].mlp


def stock_layer_tensors(
    config: "PretrainedConfig", layer: int, *, gate_up: Tensor, down: Tensor, router: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one sparse block as a twin's checkpoint has them on disk, which is what engines read.

    Args:
        config: of the twin.
        gate_up: (E, 2 W, D)
        down: (E, D, W)
        router: (E, D)
    """
    qwen = config.model_type == "qwen3_moe"
    block = f"model.layers.{layer}.{'mlp' if qwen else 'block_sparse_moe'}"
    names = ("gate_proj", "up_proj", "down_proj") if qwen else ("w1", "w3", "w2")
    yield f"{block}.gate.weight", router
    for expert, (first, last) in enumerate(zip(gate_up, down, strict=True)):
        for name, tensor in zip(names, (*first.chunk(2), last), strict=True):
            yield f"{block}.experts.{expert}.{name}.weight", tensor


def part_of(name: str) -> str:
    """Part of the freezing policy that a parameter of a twin belongs to, from its name in ``named_parameters``."""
    if ".mlp.experts." in name:
        return "experts"
    if ".mlp.gate." in name:
        return "router"
    if ".self_attn." in name and "norm" not in name:
        return "attention"
    if "norm" in name:
        return "norms"
    if "embed_tokens" in name:
        return "embeddings"
    if name.startswith("lm_head"):
        return "head"
    raise ValueError(f"parameter {name} belongs to no part")


def empty_moe(config: "PretrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    """A twin whose weights are allocated but not filled."""
    from transformers.initialization import no_init_weights

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = moe_class(config)(config)
            model.tie_weights()  # not done without initialisation
    finally:
        torch.set_default_dtype(default)
    model.config.dtype = dtype
    return model.eval()


@torch.no_grad()
def copy_shared_weights(dense: "PreTrainedModel", moe: "PreTrainedModel") -> None:
    """Copy attention, embeddings, norms and head of the dense model into its twin.

    Raises:
        ValueError: a tensor of the twin outside its sparse blocks has no counterpart.
    """
    source = dict(dense.named_parameters(remove_duplicate=False))  # tied heads stand under both names
    for name, parameter in moe.named_parameters():
        if ".mlp." in name:
            continue
        if name not in source:
            raise ValueError(f"{name} of {type(moe).__name__} is not in {type(dense).__name__}")
        parameter.copy_(source[name])


def count_parameters(config: "PretrainedConfig") -> tuple[int, int]:
    """(total, active) parameters of a stock model of this configuration; active counts top_k experts, all of a dense one.

    Computed from the shapes on the meta device: nothing is allocated.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    if experts == 0:
        return total, total
    return total, total - experts + experts // config.num_experts * config.num_experts_per_tok
