"""Experts of every layer and a dense model's other weights, put together to a Mixture-of-Experts."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from dive.model.families import (
    copy_shared_weights,
    empty_moe,
    ffn,
    fill_beside_experts,
    moe_block,
    moe_config,
    sparse_layers,
)
from dive.model.families.twin import Form
from dive.moe.implementation import use_stock_experts
from dive.moe.indexed import IndexedExperts
from dive.moe.layer import ExpertLayer
from dive.moe.plug import plug_routers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def assemble(
    dense: "PreTrainedModel", layers: Iterable[ExpertLayer], *, top_k: int, form: Form | None = None
) -> "PreTrainedModel":
    """The stock Mixture-of-Experts of the dense model's attention, embeddings, norms and head, and these experts.

    With FLAP's bias the experts get a ``down_bias``, which no stock class has, and run by our experts implementation.
    """
    moe: PreTrainedModel | None = None
    biased = False
    numbers: Iterator[int] = iter(())
    for layer in layers:
        if moe is None:
            experts, _, width = layer.down.shape
            config = moe_config(
                dense.config,
                width=width,
                experts=experts,
                top_k=min(top_k, experts),
                shared=layer.shared_width,
                form=form,
            )
            moe = empty_moe(config, dense.dtype).to(dense.device)
            copy_shared_weights(dense, moe)
            numbers = iter(sparse_layers(config))
        fill_layer(moe, next(numbers), layer)
        biased = biased or layer.bias is not None
    if moe is None:
        raise ValueError("no layers")
    moe.generation_config = dense.generation_config
    moe.requires_grad_(False)
    if biased:
        plug_routers(moe)
    else:
        use_stock_experts(moe)
    return moe


@torch.no_grad()
def assemble_indexed(
    dense: "PreTrainedModel", layers: Iterable[ExpertLayer], *, top_k: int, form: Form | None = None
) -> "PreTrainedModel":
    """As :func:`assemble`, with experts that are index sets into the dense model's own FFNs; its routers are plugged.

    Raises:
        UserError: the experts are no slices of the dense FFNs.
    """
    moe: PreTrainedModel | None = None
    numbers: Iterator[int] = iter(())
    for layer in layers:
        if moe is None:
            experts = len(layer.masks)
            config = moe_config(
                dense.config, width=1, experts=experts, top_k=min(top_k, experts), shared=layer.shared_width, form=form
            )
            moe = empty_moe(config, dense.dtype).to(dense.device)  # experts of one channel, until theirs come
            copy_shared_weights(dense, moe)
            numbers = iter(sparse_layers(config))
        number = next(numbers)
        block = moe_block(moe, number)
        block.experts = IndexedExperts(ffn(dense, number), layer).eval()
        block.gate.weight.copy_(layer.router)
        fill_beside_experts(moe, number, layer.shared)
    if moe is None:
        raise ValueError("no layers")
    moe.generation_config = dense.generation_config
    moe.requires_grad_(False)
    plug_routers(moe)
    return moe


@torch.no_grad()
def fill_layer(moe: "PreTrainedModel", number: int, layer: ExpertLayer) -> None:
    """Write one layer's experts and router into the model."""
    block = moe_block(moe, number)
    block.experts.gate_up_proj.copy_(layer.gate_up)
    block.experts.down_proj.copy_(layer.down)
    block.gate.weight.copy_(layer.router)
    fill_beside_experts(moe, number, layer.shared)
    if layer.bias is not None:
        block.experts.down_bias = nn.Parameter(layer.bias.to(block.experts.down_proj), requires_grad=False)
