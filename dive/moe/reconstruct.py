"""From a dense model and the statistics of groups of domains to a Mixture-of-Experts.

Shapes: L layers, E experts, D hidden width, F FFN channels of the dense model, W kept channels, G groups.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
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
    Start,
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
from dive.model.layers import Track
from dive.moe.coactivation import coactivation_masks
from dive.moe.distill import expert_errors, fit_router
from dive.moe.layer import ExpertLayer, convert, expert_function
from dive.moe.plug import plug_routers, use_stock_experts
from dive.moe.refine import CHUNK, layer_output, likeliest_experts, refine_layer
from dive.moe.shared import SharedExperts
from dive.progress import track
from dive.pruning import compensation as compensate
from dive.pruning.metrics import OBS_RIDGE, choose_channels, importance
from dive.pruning.statistics import ChannelStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    held_out: Sequence[ChannelStatistics] | None = None,
) -> ExpertLayer:
    """The experts of one layer from the statistics of its groups.

    Args:
        weights: of the dense FFN.
        groups: statistics (L = 1) of each group; ``dive`` makes an expert of each, the other constructions
            ``moe.experts`` experts from their union.
        seed: of this layer.
        held_out: statistics of other tokens of each group, by which a ridge of null is chosen.

    Raises:
        UserError: the statistics lack what the settings need.
    """
    if moe.construction is Construction.dive:
        statistics, others = list(groups), None if held_out is None else list(held_out)
    else:
        statistics = [sum(groups[1:], groups[0])] * moe.experts
        others = None if held_out is None else [sum(held_out[1:], held_out[0])] * moe.experts
    masks = _channels(weights, statistics, pruning, moe, seed=seed)
    refits = [
        _down(weights.down, s, mask, pruning, moe, None if others is None else others[i], common=masks.all(dim=0))
        for i, (s, mask) in enumerate(zip(statistics, masks, strict=True))
    ]
    layer = ExpertLayer(
        masks=masks,
        gate_up=torch.stack([torch.cat([weights.gate[mask], weights.up[mask]]) for mask in masks]),
        down=torch.stack(refits),
        router=torch.zeros(len(masks), weights.gate.shape[1], dtype=weights.gate.dtype),
        bias=torch.stack(
            [compensate.bias(weights.down, s.mean[0], mask) for s, mask in zip(statistics, masks, strict=True)]
        )
        if pruning.compensation is Compensation.bias
        else None,
    )
    layer.router = _router(weights, layer, groups, moe, seed=seed)
    return layer


def _channels(
    weights: FFN, statistics: Sequence[ChannelStatistics], pruning: PruningConfig, moe: MoEConfig, *, seed: int
) -> Tensor:
    """Channels of each expert, (E, F) bool; of statistics that all experts share where the construction is not ``dive``."""
    channels = weights.down.shape[1]
    width = pruning.width(channels)
    shared = min(round(moe.shared * width), width - 1)
    if moe.construction is Construction.random_split:
        return split_masks(channels, width, moe.experts, seed=seed)
    if moe.construction is Construction.coactivation:
        union = statistics[0]
        if union.coactivation is None:
            raise UserError(
                "moe.construction=coactivation needs co-activations: collect_statistics(..., active_channels=10)"
            )
        scores = importance(pruning.score_metric, weights, union, seed=seed)
        return coactivation_masks(union.coactivation[0], scores, experts=moe.experts, width=width, shared=shared)
    choose = partial(choose_channels, weights=weights, ridge=OBS_RIDGE if pruning.ridge is None else pruning.ridge)
    if moe.construction is Construction.upcycle:
        mask = choose(pruning, statistics=statistics[0], width=width, seed=seed)
        return mask.expand(moe.experts, -1).clone()
    always = None
    if shared and len(statistics) > 1:
        union = sum(statistics[1:], statistics[0])
        always = choose(pruning, statistics=union, width=shared, seed=seed)
    return torch.stack(
        [choose(pruning, statistics=s, width=width, seed=seed + i, always=always) for i, s in enumerate(statistics)]
    )


def _down(
    down: Tensor,
    statistics: ChannelStatistics,
    mask: Tensor,
    pruning: PruningConfig,
    moe: MoEConfig,
    held_out: ChannelStatistics | None,
    *,
    common: Tensor,
) -> Tensor:
    if pruning.compensation is Compensation.least_squares:
        if statistics.second_moment is None:
            raise UserError(
                "pruning.compensation=least_squares needs second moments: collect_statistics(..., second_moments=True)"
            )
        moment, ridge = statistics.second_moment[0], pruning.ridge
        if ridge is None:
            if held_out is None or held_out.second_moment is None:
                raise UserError("pruning.ridge=null needs held-out statistics; set pruning.ridge to a number")
            ridge = compensate.choose_ridge(down, moment, held_out.second_moment[0], mask)
            moment = moment + held_out.second_moment[0]
        return compensate.least_squares(down, moment, mask, ridge=ridge)
    kept = down[:, mask]
    if pruning.compensation is Compensation.none and moe.construction is Construction.random_split:
        # A random W of F channels gives W / F of the output on average; LLaMA-MoE scales it back.
        return kept * (len(mask) / int(mask.sum()))
    if pruning.compensation is Compensation.none and moe.construction is Construction.coactivation:
        # CMoE adds the chosen experts up; the stock classes average them, which is right for the common channels alone.
        return torch.where(common[mask].to(kept.device), kept, kept * moe.top_k)
    return kept


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
    wanted = torch.cat([weights.channels(rows) @ weights.down.T for rows in inputs.split(CHUNK)])
    errors = expert_errors(inputs, wanted, [expert_function(layer, e, weights.act) for e in range(experts)])
    return fit_router(inputs, errors, moe.distillation, seed=seed)


def build_layers(
    model: "PreTrainedModel",
    statistics: Iterable[Sequence[ChannelStatistics]],
    pruning: PruningConfig,
    moe: MoEConfig,
    *,
    seed: int,
    first_layer: int = 0,
) -> Iterator[ExpertLayer]:
    """Experts layer after layer, as the statistics of each layer's groups come in.

    Args:
        statistics: of each layer: of its groups, and with ``pruning.ridge`` null of as many held-out parts after them.
        first_layer: number of the layer that the statistics begin with.
    """
    numbers = itertools.count(first_layer)  # enumerate would hold what it gave out last
    for found in statistics:
        number = next(numbers)
        groups = len(found) // 2 if pruning.ridge is None else len(found)
        layer = build_layer(
            ffn(model, number),
            found[:groups],
            pruning,
            moe,
            seed=seed + 1000 * number,
            held_out=found[groups:] or None,
        )
        del found  # F² numbers a group: gone before the next layer's are collected
        yield layer
        del layer


@torch.no_grad()
def build_refined_layers(
    model: "PreTrainedModel",
    groups: Sequence[Tensor],
    pruning: PruningConfig,
    moe: MoEConfig,
    *,
    batch: int,
    seed: int,
    finished: Iterable[ExpertLayer] = (),
) -> Iterator[ExpertLayer]:
    """Experts layer after layer, refined on the tokens themselves, see :func:`dive.moe.refine.refine_layer`.

    With ``sequential`` two tracks of hidden states are kept: the dense model's, and that of the layers rebuilt so far. A
    layer learns from the second what the dense FFN makes of it, plus ``correction`` times what separates the two.

    Args:
        model: dense model.
        groups: calibration tokens (N, T) int64 of each group.
        batch: sequences per forward pass.
        seed: of the first layer.
        finished: the first layers, of an interrupted construction: the tokens pass through them, and they are not yielded.

    Raises:
        UserError: the model's hidden states are not finite.
    """
    refinement = moe.refinement
    built = iter(finished)
    batches = [part for group in groups for part in group.split(batch)]
    owner = torch.cat([torch.full((group.numel(),), number) for number, group in enumerate(groups)])
    dense = Track(model, batches)
    rebuilt = Track(model, batches) if refinement.sequential else dense
    description = f"building {moe.experts} experts" if moe.experts > 1 else "pruning"
    before: Tensor | None = None
    for number in track(range(len(decoder_layers(model))), description, "layer"):
        weights = _float32(ffn(model, number))
        full_ffn = partial(_full_ffn, weights)
        # Every tensor here is as long as all tokens together: at most four are alive beside the two tracks.
        inputs = torch.cat([rows.float().cpu() for rows in dense.attend(number)])
        targets = _in_chunks(full_ffn, inputs, weights)
        layer = next(built, None)
        known = layer is not None
        if refinement.sequential:
            del inputs
            inputs = torch.cat([rows.float().cpu() for rows in rebuilt.attend(number)])
            wanted = None if known else dense.states().sub_(rebuilt.states()).add_(targets)
            dense.add(targets)
            if wanted is not None:
                targets = _in_chunks(full_ffn, inputs, weights).lerp_(wanted, refinement.correction)
            del wanted
        else:
            dense.add(targets)
        if layer is None:
            if not (inputs.isfinite().all() and targets.isfinite().all()):
                raise UserError(
                    f"layer {number}: its FFN gets or makes what is not finite; set model.dtype=float32, or look at the weights"
                )
            layer = refine_layer(
                weights, inputs, targets, owner, pruning, moe, seed=seed + 1000 * number, before=before
            )
            layer = convert(layer, model.dtype)
        if refinement.start is Start.kmeans:
            before = likeliest_experts(layer, inputs)
        del targets
        if refinement.sequential:  # what comes after learns from the experts as they are stored
            stored = convert(layer, torch.float32, weights.down.device)
            outputs = _in_chunks(partial(layer_output, stored, weights.act, top_k=moe.top_k), inputs, weights)
            rebuilt.add(outputs)
            del outputs, stored
        del inputs
        if not known:
            yield layer
        del layer


def _full_ffn(weights: FFN, rows: Tensor) -> Tensor:
    return weights.channels(rows) @ weights.down.T


def _in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor, weights: FFN) -> Tensor:
    """``function`` (T, D) to (T, D) on the weights' device, of rows on the host, without a second copy of the result."""
    made = torch.empty_like(rows)
    for source, target in zip(rows.split(CHUNK), made.split(CHUNK), strict=True):
        target.copy_(function(source.to(weights.down.device)))
    return made


def _float32(weights: FFN) -> FFN:
    return FFN(weights.gate.float(), weights.up.float(), weights.down.float(), weights.act)


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
def assemble_shared(dense: "PreTrainedModel", layers: Iterable[ExpertLayer], *, top_k: int) -> "PreTrainedModel":
    """As :func:`assemble`, with experts that are index sets into the dense model's own FFNs; its routers are plugged.

    Raises:
        UserError: the experts are no slices of the dense FFNs.
    """
    moe: PreTrainedModel | None = None
    for number, layer in enumerate(layers):
        if moe is None:
            experts = len(layer.masks)
            config = moe_config(dense.config, width=1, experts=experts, top_k=min(top_k, experts))
            moe = empty_moe(config, dense.dtype).to(dense.device)  # experts of one channel, until theirs come
            copy_shared_weights(dense, moe)
        block = moe_block(moe, number)
        block.experts = SharedExperts(ffn(dense, number), layer).eval()
        block.gate.weight.copy_(layer.router)
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
