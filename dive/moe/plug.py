"""Plugging the training parts into a stock model, and taking them out again without a trace."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dive.config import LoRAConfig
from dive.model.families import moe_blocks, renormalises
from dive.moe.experts import GroupedLoRA
from dive.moe.implementation import use_experts, use_stock_experts
from dive.moe.router import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plug_routers(model: "PreTrainedModel", *, noise: float = 0.0) -> None:
    """Put a :class:`Router` in the place of every stock router, sharing its weight; a second call changes nothing."""
    for block in moe_blocks(model):
        if not isinstance(block.gate, Router):
            block.gate = Router(
                block.gate,
                experts=model.config.num_experts,
                top_k=model.config.num_experts_per_tok,
                renormalise=renormalises(model.config),
                noise=noise,
            )
    use_experts(model)


def routers(model: "PreTrainedModel") -> list[Router]:
    """The plugged routers, layer by layer."""
    return [module for module in model.modules() if isinstance(module, Router)]


def plug_expert_lora(model: "PreTrainedModel", lora: LoRAConfig) -> None:
    """Give every layer's experts low-rank adapters on gate, up and down; a second call changes nothing.

    They run by our experts implementation from then on.
    """
    for block in moe_blocks(model):
        experts = block.experts
        if hasattr(experts, "lora_gate"):
            continue
        width, hidden = experts.intermediate_dim, experts.hidden_dim
        make = partial(
            GroupedLoRA,
            next(experts.parameters()),
            experts.num_experts,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
        )
        experts.lora_gate = make(hidden, width)
        experts.lora_up = make(hidden, width)
        experts.lora_down = make(width, hidden)
        experts.train(experts.training)  # new modules are in training mode, whatever they are plugged into
    use_experts(model)


class LinearLoRA(nn.Module):
    """Low-rank adapter of a linear layer or an embedding: adds ``scale · B A dropout(x)`` to its output."""

    def __init__(self, owner: nn.Linear | nn.Embedding, lora: LoRAConfig) -> None:
        super().__init__()
        weight = owner.weight
        rows, columns = weight.shape
        self.is_embedding = isinstance(owner, nn.Embedding)
        out_features, in_features = (columns, rows) if self.is_embedding else (rows, columns)
        self.a = nn.Parameter(weight.new_empty(lora.rank, in_features))
        self.b = nn.Parameter(weight.new_zeros(out_features, lora.rank))
        bound = 1.0 if self.is_embedding else in_features**-0.5  # an embedding sees one-hot inputs
        nn.init.uniform_(self.a, -bound, bound)
        self.scale = lora.alpha / lora.rank
        self.dropout = nn.Dropout(lora.dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) features, or token ids (...), to (..., out)."""
        low = (
            functional.embedding(inputs, self.a.T)
            if self.is_embedding
            else functional.linear(self.dropout(inputs), self.a)
        )
        return functional.linear(low, self.b) * self.scale

    def delta(self) -> Tensor:
        """What merging adds to the owner's weight, of its shape, float32."""
        product = self.b.float() @ self.a.float() * self.scale
        return product.T if self.is_embedding else product


def _add_lora(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    adapter: Tensor = module.lora(inputs[0])
    return output + adapter


def plug_linear_lora(owner: Any, lora: LoRAConfig) -> None:
    """Give one linear layer or embedding a low-rank adapter; a second call changes nothing."""
    if not hasattr(owner, "lora"):
        owner.lora = LinearLoRA(owner, lora).train(owner.training)
        owner.lora_hook = owner.register_forward_hook(_add_lora)


@torch.no_grad()
def unplug(model: "PreTrainedModel") -> None:
    """Merge every adapter into the weights and restore the stock routers, in place.

    Afterwards the model is what its class says, and its state dict holds nothing of ours, unless the experts have
    FLAP's bias, which no stock class has a place for: that stays.
    """
    adapted: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "lora", None), LinearLoRA)]
    for owner in adapted:
        owner.weight += owner.lora.delta()
        owner.lora_hook.remove()
        del owner.lora, owner.lora_hook
    biased = False
    for block in moe_blocks(model):
        if hasattr(block.experts, "lora_gate"):
            experts = block.experts
            width = experts.down_proj.shape[-1]
            experts.gate_up_proj[:, :width] += experts.lora_gate.delta()
            experts.gate_up_proj[:, width:] += experts.lora_up.delta()
            experts.down_proj += experts.lora_down.delta()
            del experts.lora_gate, experts.lora_up, experts.lora_down
        if isinstance(block.gate, Router):
            block.gate = block.gate.to_stock(model.config)
        biased = biased or hasattr(block.experts, "down_bias")
    if not biased:
        use_stock_experts(model)
    model.requires_grad_(False).eval()
