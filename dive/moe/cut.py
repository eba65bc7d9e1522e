"""Experts cut out of a dense FFN: its channels under masks, what makes up for the others, and their routers.

Shapes: E experts, D hidden width, F FFN channels of the dense model, W kept channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dive.config import Compensation, MoEConfig, PruningConfig, RouterInit
from dive.errors import UserError
from dive.model.families import FFN
from dive.moe.distill import expert_errors, fit_router
from dive.moe.gates import scaled_to_gates
from dive.moe.layer import CHUNK, ExpertLayer, dense_output, expert_function
from dive.moe.walk import Group
from dive.pruning import compensation as compensate
from dive.ranks import ALONE, Ranks


def cut_experts(
    weights: FFN,
    masks: Tensor,
    fitted: Sequence[Group],
    groups: Sequence[Group],
    pruning: PruningConfig,
    moe: MoEConfig,
    *,
    seed: int,
    scale: float | Tensor = 1.0,
    ranks: Ranks = ALONE,
) -> ExpertLayer:
    """The experts of these channels, and their router.

    Args:
        weights: of the dense FFN.
        masks: (E, F) bool, channels of each expert.
        fitted: E, what each expert is fitted to.
        groups: all tokens, to which the routers are fitted.
        seed: of the router.
        scale: of the channels where nothing makes up for the others; one number, or one of each, (F,).
        ranks: the processes that compute together, which all are given the same; each fits some of the experts.

    Raises:
        UserError: the statistics lack what the settings need.
    """

    def down(expert: int) -> Tensor:
        return _down(weights.down, fitted[expert], masks[expert], pruning, scale)

    like = weights.down.new_empty(weights.down.shape[0], int(masks[0].sum()))
    layer = ExpertLayer(
        masks=masks,
        gate_up=torch.stack([torch.cat([weights.gate[mask], weights.up[mask]]) for mask in masks]),
        down=torch.stack(ranks.each(len(masks), down, like)),
        router=torch.zeros(len(masks), weights.gate.shape[1], dtype=weights.gate.dtype),
        bias=torch.stack(
            [
                compensate.bias(weights.down, group.statistics.mean[0], mask)
                for group, mask in zip(fitted, masks, strict=True)
            ]
        )
        if pruning.compensation is Compensation.bias
        else None,
    )
    layer.router = _router(weights, layer, groups, moe, seed=seed, ranks=ranks)
    if moe.scales:
        rows = _inputs(weights, groups, "moe.gates=probabilities")
        layer = scaled_to_gates(layer, weights.act, rows, _outputs(weights, rows), top_k=moe.top_k)
    return layer


def common_channels(share: float, width: int) -> int:
    """Channels that all experts have, of ``width``: the share of them, and never all."""
    return min(round(share * width), width - 1)


def _down(down: Tensor, group: Group, mask: Tensor, pruning: PruningConfig, scale: float | Tensor) -> Tensor:
    if pruning.compensation is Compensation.least_squares:
        if group.statistics.second_moment is None:
            raise UserError(
                "pruning.compensation=least_squares needs second moments: collect_statistics(..., second_moments=True)"
            )
        moment, ridge = group.statistics.second_moment[0], pruning.ridge
        if ridge is None:
            if group.held_out is None or group.held_out.second_moment is None:
                raise UserError("pruning.ridge=null needs held-out statistics; set pruning.ridge to a number")
            others = group.held_out.second_moment[0]
            ridge = compensate.choose_ridge(down, moment, others, mask)
            moment = moment + others
        return compensate.least_squares(down, moment, mask, ridge=ridge)
    kept = down[:, mask]
    if pruning.compensation is Compensation.none:
        return kept * (scale[mask].to(kept) if isinstance(scale, Tensor) else scale)
    return kept


def _router(
    weights: FFN, layer: ExpertLayer, groups: Sequence[Group], moe: MoEConfig, *, seed: int, ranks: Ranks
) -> Tensor:
    experts, hidden = len(layer.masks), weights.gate.shape[1]
    if experts == 1:
        return torch.zeros(1, hidden, dtype=weights.gate.dtype, device=weights.gate.device)
    if moe.settings.router_init is RouterInit.random:
        generator = torch.Generator().manual_seed(seed)
        bound = hidden**-0.5  # torch's own default for a linear layer
        start = torch.empty(experts, hidden).uniform_(-bound, bound, generator=generator)
        return start.to(weights.gate)
    inputs = _inputs(weights, groups, f"moe.{moe.construction}.router_init=distilled")
    functions = [expert_function(layer, e, weights.act) for e in range(experts)]
    errors = expert_errors(inputs, _outputs(weights, inputs), functions, ranks=ranks)
    return fit_router(inputs, errors, moe.distillation, seed=seed, ranks=ranks)


def _inputs(weights: FFN, groups: Sequence[Group], setting: str) -> Tensor:
    """What the FFN is given on sampled tokens of all groups, (T, D).

    Args:
        setting: that needs them.
    """
    sampled = [group.statistics.inputs[0] for group in groups if group.statistics.inputs is not None]
    if len(sampled) != len(groups):
        raise UserError(f"{setting} needs FFN inputs: collect_statistics(..., inputs=2048)")
    return torch.cat(sampled).to(weights.gate.device)


def _outputs(weights: FFN, inputs: Tensor) -> Tensor:
    return torch.cat([dense_output(weights, rows) for rows in inputs.split(CHUNK)])
