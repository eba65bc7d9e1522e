"""Where each model family keeps its FFNs, and what its Mixture-of-Experts twin is called.

Nothing outside this folder knows how a family is built. A new one is a file beside this one and its place in :data:`TWINS`.

Shapes: L layers, D hidden width, F FFN channels of the dense model, W channels kept, E experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dive.config import AUTO, Config, Gates
from dive.errors import UserError, require
from dive.model.families.mixtral import Mixtral
from dive.model.families.qwen2_moe import Qwen2Moe
from dive.model.families.qwen3_moe import Qwen3Moe
from dive.model.families.twin import UNTRAINED as UNTRAINED
from dive.model.families.twin import Form, Twin, Unserved

if TYPE_CHECKING:  # the plan imports this without torch
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

TWINS: tuple[Twin, ...] = (Mixtral(), Qwen3Moe(), Qwen2Moe())
"""What dense models can become; one that can become several becomes the first of them where nobody chooses."""

SUPPORTED = tuple(dict.fromkeys(name for twin in TWINS for name in twin.dense))
"""``model_type`` of the dense models that can be turned into a Mixture-of-Experts."""

KNOWN = (*SUPPORTED, *(twin.name for twin in TWINS))
"""``model_type`` of these and of what they become."""

IN_GGUF: dict[str, bool] = {name: paired for twin in TWINS for name, paired in twin.in_gguf.items()}
"""``general.architecture`` of GGUF files that can be read, see :attr:`Twin.in_gguf`."""


def twin_of(model_type: str) -> Twin:
    """The twin that is called so, or that dense models called so become where nobody chooses.

    Of a dense model all its twins say the same.

    Raises:
        ValueError: none.
    """
    for twin in TWINS:
        if model_type in (twin.name, *twin.dense):
            return twin
    raise ValueError(f"model_type {model_type!r} belongs to no family; there are {', '.join(KNOWN)}")


def chosen_twin(model_type: str, name: str) -> Twin:
    """The twin that dense models of a ``model_type`` become.

    Args:
        name: ``model.twin``.

    Raises:
        UserError: they cannot become this one.
    """
    possible = {twin.name: twin for twin in TWINS if model_type in twin.dense}
    choices = ", ".join((AUTO, *possible))
    require(
        name == AUTO or name in possible,
        f"model.twin={name}: a dense model of model_type {model_type!r} does not become this; choose one of {choices}",
    )
    return twin_of(model_type) if name == AUTO else possible[name]


def unsupported(path: str, family: object) -> str:
    """What is said of a model of another ``model_type``."""
    return f"model.path={path}: model_type {family!r} is not supported; choose one of {', '.join(SUPPORTED)}"


def check_family(model_type: str, path: str) -> None:
    """Raise :class:`UserError` if the model at ``path`` has no Mixture-of-Experts twin among the stock classes."""
    if model_type not in SUPPORTED:
        raise UserError(unsupported(path, model_type))


def check_supported(config: "PretrainedConfig", path: str) -> None:
    """Raise :class:`UserError` if the model at ``path`` has no twin, or something that its twin has no place for."""
    check_family(config.model_type, path)
    twin_of(config.model_type).check(config, path)


def form_of(config: Config, model_type: str) -> Form:
    """What a run chooses for a dense model of a ``model_type``.

    Raises:
        UserError: it cannot become the class that is chosen.
    """
    moe = config.moe
    return Form(
        twin=chosen_twin(model_type, config.model.twin).name,
        gates=moe.gates if moe.scales else Gates.renormalised,
        dense_layers=tuple(sorted(moe.dense_layers)),
        shares=moe.shares,
    )


def check_form(form: Form, model_type: str, *, layers: int, suits: Callable[[Twin], bool] = lambda _: True) -> None:
    """Refuse a choice that the stock class, or a model of so many layers, has no place for.

    Args:
        suits: whether the dense model can become a twin at all; others are not named as a way out.

    Raises:
        UserError: it has none.
    """
    lacking = chosen_twin(model_type, form.twin).lacks(form)
    if lacking is not None:
        what, instead = lacking
        others = [o.name for o in TWINS if model_type in o.dense and o.lacks(form) is None and suits(o)]
        raise UserError(f"{what}; set {', or '.join([*(f'model.twin={name}' for name in others), instead])}")
    beyond = [number for number in form.dense_layers if number >= layers]
    require(not beyond, f"{form.stated_layers}: the model's {layers} layers are numbered from 0 to {layers - 1}")
    require(len(form.dense_layers) < layers, f"{form.stated_layers} leaves no layer to have experts; take one away")


def check_chosen(form: Form, config: "PretrainedConfig", path: str) -> None:
    """Raise :class:`UserError` if the model at ``path`` cannot become what is chosen, or has something it has no place for."""

    def suits(twin: Twin) -> bool:
        try:
            twin.check(config, path)
        except UserError:
            return False
        return True

    chosen_twin(config.model_type, form.twin).check(config, path)
    check_form(form, config.model_type, layers=config.num_hidden_layers, suits=suits)


def moe_config(
    dense: "PretrainedConfig", *, width: int, experts: int, top_k: int, shared: int = 0, form: Form | None = None
) -> "PretrainedConfig":
    """The stock configuration of the twin: everything of ``dense``, with ``experts`` FFNs of ``width`` channels.

    Grouped-query attention, tied embeddings and RoPE scaling are carried over.
    """
    form = form or Form()
    twin = chosen_twin(dense.model_type, form.twin)
    return twin.config(dense, width=width, experts=experts, top_k=top_k, shared=shared, form=form)


def moe_class(config: "PretrainedConfig") -> type["PreTrainedModel"]:
    """The stock model class of a configuration made by :func:`moe_config`."""
    return twin_of(config.model_type).model_class()


@dataclass(slots=True)
class FFN:
    """One gated FFN: ``down @ (act(gate @ x) * (up @ x))``."""

    gate: "Tensor"
    """(F, D)"""
    up: "Tensor"
    """(F, D)"""
    down: "Tensor"
    """(D, F)"""
    act: "nn.Module"

    def channels(self, inputs: "Tensor") -> "Tensor":
        """Input of ``down_proj``: (..., D) to (..., F)."""
        product: Tensor = self.act(inputs @ self.gate.T) * (inputs @ self.up.T)
        return product


def decoder_layers(model: "PreTrainedModel") -> "nn.ModuleList":
    """The decoder layers of a dense model or its twin."""
    layers: nn.ModuleList = model.get_submodule(twin_of(model.config.model_type).layers)
    return layers


def ffn(model: "PreTrainedModel", layer: int) -> FFN:
    """Weights of the dense FFN of one layer (views, not copies)."""
    gate, up, down = (module.weight.detach() for module in ffn_projections(model, layer))
    module, _ = ffn_modules(model, layer)
    return FFN(gate, up, down, act=module.get_submodule(twin_of(model.config.model_type).activation))


def ffn_modules(model: "PreTrainedModel", layer: int) -> tuple["nn.Module", "nn.Module"]:
    """(the dense FFN, its ``down_proj``) of one layer, for hooks."""
    twin = twin_of(model.config.model_type)
    module = decoder_layers(model)[layer].get_submodule(twin.ffn)
    return module, module.get_submodule(twin.projections[2])


def ffn_projections(model: "PreTrainedModel", layer: int) -> tuple[Any, Any, Any]:
    """(``gate_proj``, ``up_proj``, ``down_proj``) of one layer of the dense model, for hooks."""
    twin = twin_of(model.config.model_type)
    gate, up, down = map(decoder_layers(model)[layer].get_submodule(twin.ffn).get_submodule, twin.projections)
    return gate, up, down


def moe_block(model: "PreTrainedModel", layer: int) -> Any:
    """The sparse block of one layer of a twin: it has ``gate`` (router) and ``experts`` (fused 3-D weights)."""
    return decoder_layers(model)[layer].get_submodule(twin_of(model.config.model_type).block)


def sparse_layers(config: "PretrainedConfig") -> list[int]:
    """Numbers of the layers that have experts, in a twin of this configuration."""
    return twin_of(config.model_type).sparse_layers(config)


def moe_blocks(model: "PreTrainedModel") -> list[Any]:
    """The sparse blocks of a twin, in the order of its layers."""
    return [moe_block(model, layer) for layer in sparse_layers(model.config)]


def attention_projections(model: "PreTrainedModel", layer: int) -> list["nn.Linear"]:
    """The linear maps of one layer's attention."""
    from torch import nn

    attention = decoder_layers(model)[layer].get_submodule(twin_of(model.config.model_type).attention)
    return [module for module in attention.modules() if isinstance(module, nn.Linear)]


def part_of(model: "PreTrainedModel", parameter: str) -> str:
    """Part of the freezing policy that a parameter of a twin belongs to, from its name in ``named_parameters``."""
    return twin_of(model.config.model_type).part_of(model.config, parameter)


def is_inherited(model: "PreTrainedModel", parameter: str) -> bool:
    """Whether a twin has a parameter from its dense model, from its name in ``named_parameters``."""
    return twin_of(model.config.model_type).is_inherited(model.config, parameter)


def renormalises(config: "PretrainedConfig") -> bool:
    """Whether the gates of the chosen experts sum to one, in a twin of this configuration."""
    return bool(getattr(config, "norm_topk_prob", True))


def unserved(config: "PretrainedConfig") -> list[Unserved]:
    """Engines that do not serve a Mixture-of-Experts of this configuration rightly, see :meth:`Twin.unserved`."""
    twin = twin_of(config.model_type)
    dense = set(range(config.num_hidden_layers)) - set(twin.sparse_layers(config))
    form = Form(
        twin=twin.name,
        gates=Gates.renormalised if renormalises(config) else Gates.probabilities,
        dense_layers=tuple(sorted(dense)),
    )
    return twin.unserved(form, config, experts=config.num_experts)


def is_zero_at_first(model: "PreTrainedModel", parameter: str) -> bool:
    """Whether a parameter that a twin would have from its dense model is zero where that has none, from its name."""
    return twin_of(model.config.model_type).is_zero_at_first(parameter)


def shared_projections(model: "PreTrainedModel") -> list["nn.Linear"]:
    """The linear maps of all layers' shared experts, where they add anything."""
    names = twin_of(model.config.model_type).shared_projections(model.config)
    return [block.get_submodule(name) for block in moe_blocks(model) for name in names]


def fill_beside_experts(model: "PreTrainedModel", layer: int, shared: "tuple[Tensor, Tensor] | None") -> None:
    """Write what a sparse block has beside router and experts.

    Args:
        shared: gate and up (2 S, D) and down (D, S) of the shared expert, if there is one.
    """
    block = moe_block(model, layer)
    for name, tensor in twin_of(model.config.model_type).beside_experts(model.config, shared).items():
        block.get_parameter(name).data.copy_(tensor)


def stock_layer_tensors(
    config: "PretrainedConfig",
    layer: int,
    *,
    gate_up: "Tensor",
    down: "Tensor",
    router: "Tensor",
    shared: "tuple[Tensor, Tensor] | None" = None,
) -> Iterator[tuple[str, "Tensor"]]:
    """(name, tensor) of one sparse block as a twin's checkpoint has them on disk, which is what engines read.

    Args:
        config: of the twin.
        gate_up: (E, 2 W, D)
        down: (E, D, W)
        router: (E, D)
        shared: gate and up (2 S, D) and down (D, S) of the shared expert, if there is one.
    """
    twin = twin_of(config.model_type)
    block = f"{twin.layers}.{layer}.{twin.block_on_disk}"
    yield f"{block}.gate.weight", router
    for expert, (first, last) in enumerate(zip(gate_up, down, strict=True)):
        for name, tensor in zip(twin.experts_on_disk, (*first.chunk(2), last), strict=True):
            yield f"{block}.experts.{expert}.{name}.weight", tensor
    for name, tensor in twin.beside_experts(config, shared).items():
        yield f"{block}.{name}", tensor


def empty_moe(config: "PretrainedConfig", dtype: "torch.dtype") -> "PreTrainedModel":
    """A twin whose weights are allocated but not filled."""
    import torch
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


def copy_shared_weights(dense: "PreTrainedModel", moe: "PreTrainedModel") -> None:
    """Copy attention, embeddings, norms and head of the dense model into its twin.

    Raises:
        ValueError: a tensor of the twin outside its sparse blocks has no counterpart.
    """
    import torch

    source = dict(dense.named_parameters(remove_duplicate=False))  # tied heads stand under both names
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if not is_inherited(moe, name):
                continue
            if name not in source and is_zero_at_first(moe, name):
                parameter.zero_()
                continue
            if name not in source:
                raise ValueError(f"{name} of {type(moe).__name__} is not in {type(dense).__name__}")
            parameter.copy_(source[name])


def count_parameters(config: "PretrainedConfig") -> tuple[int, int]:
    """(total, active) parameters of a stock model of this configuration; active counts top_k experts, all of a dense one.

    Computed from the shapes on the meta device: nothing is allocated.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    if config.model_type in SUPPORTED:
        return total, total
    one_of_many = f".{twin_of(config.model_type).block}.experts."
    experts = sum(p.numel() for name, p in model.named_parameters() if one_of_many in name)
    return total, total - experts + experts // config.num_experts * config.num_experts_per_tok
