"""From a dense model and the statistics of groups of domains to a Mixture-of-Experts.

Shapes: L layers, E experts, D hidden width, F FFN channels of the dense model, W kept channels, G groups.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dive.config import (
    Compensation,
    Construction,
    Metric,
    MoEConfig,
    PruningConfig,
    RouterInit,
    require,
)
from dive.errors import UserError
from dive.model.families import (
    FFN,
    copy_shared_weights,
    decoder_layers,
    empty_moe,
    ffn,
    moe_block,
    moe_config,
)
from dive.moe.coactivation import coactivation_masks
from dive.moe.distill import expert_errors, fit_router
from dive.moe.plug import plug_routers, use_stock_experts
from dive.pruning import compensation as compensate
from dive.pruning.metrics import importance, keep_highest
from dive.pruning.statistics import ChannelStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class ExpertLayer:
    """One layer's experts and router."""

    masks: Tensor
    """(E, F) bool, true for the channels an expert kept."""
    gate_up: Tensor
    """(E, 2 W, D)"""
    down: Tensor
    """(E, D, W)"""
    router: Tensor
    """(E, D)"""
    bias: Tensor | None = None
    """(E, D), FLAP's compensation."""

    def tensors(self) -> dict[str, Tensor]:
        """For safetensors."""
        named = {"masks": self.masks, "gate_up": self.gate_up, "down": self.down, "router": self.router}
        return named if self.bias is None else named | {"bias": self.bias}


def split_masks(channels: int, width: int, experts: int, *, seed: int) -> Tensor:
    """Random channels of each expert, (E, F) bool: disjoint while there are enough, and used as evenly as can be.

    Random permutations of the channels, one after another, are cut into pieces of ``width`` (LLaMA-MoE,
    arXiv 2406.16554, independent neurons; with more than F channels in all, each is used again only after all others).
    """
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(experts, channels, dtype=torch.bool)
    waiting: list[int] = []
    for mask in masks:
        chosen: list[int] = []
        while len(chosen) < width:
            if not waiting:
                waiting = torch.randperm(channels, generator=generator).tolist()
            taken = set(chosen)
            # A fresh permutation may start with a channel this expert has: it waits for the next expert.
            position = next(i for i, channel in enumerate(waiting) if channel not in taken)
            chosen.append(waiting.pop(position))
        mask[chosen] = True
    return masks


def build_layer(
    weights: FFN,
    groups: Sequence[ChannelStatistics],
    pruning: PruningConfig,
    moe: MoEConfig,
    *,
    seed: int,
) -> ExpertLayer:
    """The experts of one layer from the statistics of its groups.

    Args:
        weights: of the dense FFN.
        groups: statistics (L = 1) of each group; ``dive`` makes an expert of each, the other constructions
            ``moe.experts`` experts from their union.
        seed: of this layer.

    Raises:
        UserError: the statistics lack what the settings need.
    """
    channels = weights.down.shape[1]
    width = pruning.width(channels)
    shared = min(round(moe.shared * width), width - 1)
    if moe.construction is Construction.dive:
        expert_statistics = list(groups)
        scores = [importance(pruning.metric, weights, s, seed=seed + i) for i, s in enumerate(groups)]
        if shared and len(groups) > 1:
            union = sum(groups[1:], groups[0])
            always = keep_highest(importance(pruning.metric, weights, union, seed=seed), shared)
            scores = [s.masked_fill(always.to(s.device), torch.inf) for s in scores]
        masks = torch.stack([keep_highest(s, width) for s in scores])
    else:
        union = sum(groups[1:], groups[0])
        expert_statistics = [union] * moe.experts
        if moe.construction is Construction.coactivation:
            if union.coactivation is None:
                raise UserError(
                    "moe.construction=coactivation needs co-activations: collect_statistics(..., active_channels=10)"
                )
            masks = coactivation_masks(
                union.coactivation[0],
                importance(pruning.metric, weights, union, seed=seed),
                experts=moe.experts,
                width=width,
                shared=shared,
            )
        elif moe.construction is Construction.upcycle:
            mask = keep_highest(importance(pruning.metric, weights, union, seed=seed), width)
            masks = mask.expand(moe.experts, -1).clone()
        else:
            masks = split_masks(channels, width, moe.experts, seed=seed)

    layer = ExpertLayer(
        masks=masks,
        gate_up=torch.stack([torch.cat([weights.gate[mask], weights.up[mask]]) for mask in masks]),
        down=torch.stack(
            [
                _down(weights.down, s, mask, pruning, moe, common=masks.all(dim=0))
                for s, mask in zip(expert_statistics, masks, strict=True)
            ]
        ),
        router=torch.zeros(len(masks), weights.gate.shape[1], dtype=weights.gate.dtype),
        bias=torch.stack(
            [compensate.bias(weights.down, s.mean[0], mask) for s, mask in zip(expert_statistics, masks, strict=True)]
        )
        if pruning.compensation is Compensation.bias
        else None,
    )
    layer.router = _router(weights, layer, groups, moe, seed=seed)
    return layer


def _down(
    down: Tensor, statistics: ChannelStatistics, mask: Tensor, pruning: PruningConfig, moe: MoEConfig, *, common: Tensor
) -> Tensor:
    if pruning.compensation is Compensation.least_squares:
        if statistics.second_moment is None:
            raise UserError(
                "pruning.compensation=least_squares needs second moments: collect_statistics(..., second_moments=True)"
            )
        return compensate.least_squares(down, statistics.second_moment[0], mask, ridge=pruning.ridge)
    kept = down[:, mask]
    if pruning.compensation is Compensation.none and moe.construction is Construction.random_split:
        # A random W of F channels gives W / F of the output on average; LLaMA-MoE scales it back.
        return kept * (len(mask) / int(mask.sum()))
    if pruning.compensation is Compensation.none and moe.construction is Construction.coactivation:
        # CMoE adds the chosen experts up; the stock classes average them, which is right for the common channels alone.
        return torch.where(common[mask].to(kept.device), kept, kept * moe.top_k)
    return kept


def expert_function(layer: ExpertLayer, expert: int, act: nn.Module) -> Callable[[Tensor], Tensor]:
    """One expert as a function (T, D) to (T, D)."""
    gate, up = layer.gate_up[expert].chunk(2)
    pruned = FFN(gate, up, layer.down[expert], act)

    def run(inputs: Tensor) -> Tensor:
        output = pruned.channels(inputs) @ pruned.down.T
        return output if layer.bias is None else output + layer.bias[expert]

    return run


def _router(
    weights: FFN, layer: ExpertLayer, groups: Sequence[ChannelStatistics], moe: MoEConfig, *, seed: int
) -> Tensor:
    experts, hidden = len(layer.masks), weights.gate.shape[1]
    if experts == 1:
        return torch.zeros(1, hidden, dtype=weights.gate.dtype, device=weights.gate.device)
    if moe.router_init is RouterInit.random:
        generator = torch.Generator().manual_seed(seed)
        bound = hidden**-0.5  # torch's own default for a linear layer
        start = torch.empty(experts, hidden).uniform_(-bound, bound, generator=generator)
        return start.to(weights.gate)
    sampled = [s.inputs[0] for s in groups if s.inputs is not None]
    if len(sampled) != len(groups):
        raise UserError("moe.router_init=distilled needs FFN inputs: collect_statistics(..., inputs=2048)")
    inputs = torch.cat(sampled).to(weights.gate.device)
    errors = expert_errors(
        inputs,
        lambda rows: weights.channels(rows) @ weights.down.T,
        [expert_function(layer, e, weights.act) for e in range(experts)],
    )
    return fit_router(inputs, errors, moe.distillation, seed=seed)


def build_layers(
    model: "PreTrainedModel",
    statistics: Iterable[Sequence[ChannelStatistics]],
    pruning: PruningConfig,
    moe: MoEConfig,
    *,
    seed: int,
) -> Iterator[ExpertLayer]:
    """Experts layer after layer, as the statistics of each layer's groups come in."""
    for number, groups in enumerate(statistics):
        yield build_layer(ffn(model, number), groups, pruning, moe, seed=seed + 1000 * number)


def assemble(dense: "PreTrainedModel", layers: Iterable[ExpertLayer], *, top_k: int) -> "PreTrainedModel":
    """The stock Mixture-of-Experts of the dense model's attention, embeddings, norms and head, and these experts.

    With FLAP's bias the experts get a ``down_bias``, which no stock class has, and run by our experts implementation.
    """
    moe: PreTrainedModel | None = None
    biased = False
    for number, layer in enumerate(layers):
        if moe is None:
            experts, _, width = layer.down.shape
            config = moe_config(dense.config, width=width, experts=experts, top_k=min(top_k, experts))
            moe = empty_moe(config, dense.dtype).to(dense.device)
            copy_shared_weights(dense, moe)
        fill_layer(moe, number, layer)
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
def fill_layer(moe: "PreTrainedModel", number: int, layer: ExpertLayer) -> None:
    """Write one layer's experts and router into the model."""
    block = moe_block(moe, number)
    block.experts.gate_up_proj.copy_(layer.gate_up)
    block.experts.down_proj.copy_(layer.down)
    block.gate.weight.copy_(layer.router)
    if layer.bias is not None:
        block.experts.down_bias = nn.Parameter(layer.bias.to(block.experts.down_proj), requires_grad=False)


def reconstruct(
    model: "PreTrainedModel",
    group_statistics: Sequence[ChannelStatistics],
    *,
    ratio: float,
    top_k: int = 1,
    metric: str = "wifv",
    compensation: str = "least_squares",
    router_init: str = "distilled",
    width_multiple: int = 8,
    seed: int = 42,
) -> "PreTrainedModel":
    """Build the Mixture-of-Experts: one expert a group, pruned on that group's statistics.

    Args:
        model: dense model.
        group_statistics: of each group over all layers: the sum of its domains' statistics.
        ratio: share of every FFN's channels that each expert loses, in (0, 1).
        top_k: experts a token.
        metric: ``wifv``, ``ifv``, ``wifn``, ``magnitude`` or ``random``.
        compensation: ``least_squares``, ``bias`` or ``none``.
        router_init: ``distilled`` or ``random``.
        width_multiple: the kept width is rounded to this multiple.
        seed: of routers and random scores.

    Raises:
        UserError: the settings contradict each other, or the statistics lack what they need.
    """
    require(len(group_statistics) > 0, "group_statistics is empty")
    for name, value, choices in (
        ("metric", metric, Metric),
        ("compensation", compensation, Compensation),
        ("router_init", router_init, RouterInit),
    ):
        require(
            value in [c.value for c in choices],
            f"{name}={value!r}: choose one of {[c.value for c in choices]}",
        )
    pruning = PruningConfig(
        metric=Metric(metric),
        ratio=ratio,
        compensation=Compensation(compensation),
        width_multiple=width_multiple,
    )
    moe = MoEConfig(experts=len(group_statistics), top_k=top_k, router_init=RouterInit(router_init))
    by_layer = ([s.layer(i) for s in group_statistics] for i in range(len(decoder_layers(model))))
    return assemble(model, build_layers(model, by_layer, pruning, moe, seed=seed), top_k=top_k)
