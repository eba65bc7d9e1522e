"""Experts refined on tokens, one layer at a time: k-means whose centroids are pruned FFNs, then local gradient steps.

Shapes: T tokens, D hidden width, F channels of the dense FFN, W channels of an expert, E experts, K experts a token.
"""

import math
from functools import partial

import torch
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dive.config import Gates, MoEConfig, PruningConfig, RefinedConfig, Start
from dive.model.families import FFN
from dive.moe.balance import overload
from dive.moe.distill import expert_errors, fit_router
from dive.moe.gates import scaled_to_gates
from dive.moe.layer import (
    CHUNK,
    ExpertLayer,
    convert,
    expert_function,
    float32,
    gates_of,
    likeliest_experts,
    pair_errors,
    selected_outputs,
)
from dive.moe.walk import LayerTokens, TokenWalk
from dive.pruning.compensation import choose_ridge, held_out, least_squares
from dive.pruning.metrics import choose_channels
from dive.pruning.statistics import ChannelStatistics, batch_statistics, sampled_rows

WALK = TokenWalk
KMEANS_TOKENS = 32768
ROUND_TOKENS = 4
"""Tokens a channel from which an expert is derived in the rounds before the last one: they only say which tokens it gets."""
NEGLIGIBLE = 0.01
"""Probability of a token's second expert below which a local step leaves it out: most tokens', once the router is sure."""


def layer(weights: FFN, tokens: LayerTokens, pruning: PruningConfig, moe: MoEConfig, *, seed: int) -> ExpertLayer:
    """The experts of one layer, from the tokens themselves.

    Each expert's channels and refit are derived from its tokens; a router is fitted to the experts' errors; tokens go to
    the expert their router picks; and so on, ``rounds`` times. Then ``steps`` gradient steps on all of it. Computed in
    float32, returned in the weights' element type.

    Args:
        weights: of the dense FFN.
        tokens: what it is given and should return.
        seed: of this layer.
    """
    settings = moe.refined
    assert settings is not None
    inputs, targets, element = tokens.inputs, tokens.targets, weights.gate.dtype
    weights = float32(weights)
    assignment = first_assignment(inputs, tokens.groups, settings.start, experts=moe.experts, seed=seed)
    if tokens.before is not None:
        assignment = renumbered(assignment, tokens.before, experts=moe.experts)
    sample = sampled_rows(len(inputs), moe.distillation.tokens, seed=seed)
    device = weights.down.device
    for last in [False] * (settings.rounds if moe.experts > 1 else 0) + [True]:
        most = None if last else ROUND_TOKENS * weights.down.shape[1]
        found = derive_experts(weights, inputs, targets, assignment, pruning, experts=moe.experts, most=most, seed=seed)
        if moe.experts == 1:
            break
        rows, wanted = inputs.index_select(0, sample).to(device), targets.index_select(0, sample).to(device)
        errors = expert_errors(rows, wanted, [expert_function(found, e, weights.act) for e in range(moe.experts)])
        found.router = fit_router(rows, errors, moe.distillation, seed=seed)
        if not last:
            assignment = likeliest_experts(found, inputs)
    scaled = partial(scaled_to_gates, act=weights.act, inputs=inputs, targets=targets, top_k=moe.top_k)
    if moe.scales and moe.top_k > 1:  # of one expert the steps leave the gate out
        found = scaled(found)
    if settings.steps:
        found = train_layer(found, weights.act, inputs, targets, settings, top_k=moe.top_k, gates=moe.gates, seed=seed)
    return convert(scaled(found) if moe.scales else found, element)


def first_assignment(inputs: Tensor, groups: Tensor | None, start: Start | None, *, experts: int, seed: int) -> Tensor:
    """Expert of each token before the first round, (T,) int64: its group's, where there are any."""
    if experts == 1:
        return torch.zeros(len(inputs), dtype=torch.int64)
    if groups is not None:
        return groups
    if start is Start.random:
        return torch.randint(experts, (len(inputs),), generator=torch.Generator().manual_seed(seed))
    rows = sampled_rows(len(inputs), KMEANS_TOKENS, seed=seed)
    centroids, _ = kmeans2(inputs[rows].double().cpu().numpy(), experts, minit="++", rng=seed)
    centres = torch.from_numpy(centroids).to(inputs)
    return torch.cat([torch.cdist(part, centres).argmin(dim=-1).cpu() for part in inputs.split(CHUNK)])


def renumbered(assignment: Tensor, other: Tensor, *, experts: int) -> Tensor:
    """The assignment (T,), its experts numbered so that as many tokens as can be have the number that ``other`` gives them."""
    together = torch.bincount(assignment * experts + other, minlength=experts**2).view(experts, experts)
    _, number = linear_sum_assignment(together.numpy(), maximize=True)
    return torch.from_numpy(number)[assignment]


def token_statistics(weights: FFN, inputs: Tensor, targets: Tensor, rows: Tensor) -> tuple[ChannelStatistics, Tensor]:
    """(statistics with second moments, Σ y xᵀ (D, F)) of some rows: x the FFN's channels, y the target."""
    device = weights.down.device
    merged = ChannelStatistics(0, torch.empty(0), torch.empty(0))
    cross = torch.zeros_like(weights.down)
    for part in rows.split(CHUNK):
        channels = weights.channels(inputs.index_select(0, part).to(device))
        merged += batch_statistics(channels, second_moment=True, inputs=None)
        cross += targets.index_select(0, part).to(device).T @ channels
    return merged, cross


def derive_experts(
    weights: FFN,
    inputs: Tensor,
    targets: Tensor,
    assignment: Tensor,
    pruning: PruningConfig,
    *,
    experts: int,
    most: int | None = None,
    seed: int,
) -> ExpertLayer:
    """One pruned and refitted FFN for each expert's tokens, or of ``most`` of them; the routers are zero.

    One expert's moments are alive at a time. An expert with fewer tokens than channels to keep starts over from random ones,
    as k-means does.
    """
    width = pruning.width(weights.down.shape[1])
    masks, gate_up, down = [], [], []
    for expert in range(experts):
        rows = (assignment == expert).nonzero().squeeze(1)
        if len(rows) < width:
            rows = sampled_rows(len(inputs), max(len(inputs) // experts, 1), seed=seed + expert)
        elif most is not None and len(rows) > most:
            rows = rows[sampled_rows(len(rows), most, seed=seed + expert)]
        held = held_out(len(rows)) if pruning.ridge is None else torch.zeros(len(rows), dtype=torch.bool)
        statistics, cross = token_statistics(weights, inputs, targets, rows[~held])
        moment = _moment(statistics)
        ridge = pruning.ridge
        chosen = choose_channels(
            pruning,
            weights,
            statistics,
            width=width,
            cross=cross,
            seed=seed + expert,
        )
        if ridge is None:
            other, other_cross = token_statistics(weights, inputs, targets, rows[held])
            ridge = choose_ridge(weights.down, moment, _moment(other), chosen, cross=(cross, other_cross))
            moment, cross = moment + _moment(other), cross + other_cross
        masks.append(chosen)
        gate_up.append(torch.cat([weights.gate[chosen], weights.up[chosen]]))
        down.append(least_squares(weights.down, moment, chosen, ridge=ridge, cross=cross))
    return ExpertLayer(
        masks=torch.stack(masks),
        gate_up=torch.stack(gate_up),
        down=torch.stack(down),
        router=weights.gate.new_zeros(experts, weights.gate.shape[1]),
    )


def _moment(statistics: ChannelStatistics) -> Tensor:
    assert statistics.second_moment is not None
    return statistics.second_moment[0]


def train_layer(
    start: ExpertLayer,
    act: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    settings: RefinedConfig,
    *,
    top_k: int,
    gates: Gates = Gates.renormalised,
    seed: int,
) -> ExpertLayer:
    """Gradient steps on one layer's experts and router against its targets, in float32.

    With K > 1 the loss is the squared error of the block's output. With K = 1 its gate is constant, or taken for 1, so the
    loss is the expected error over the two likeliest experts, Σ p_k ‖y − expert_k(x)‖²: its minimum sends each token to the
    better one.
    Where p_2 is less than :data:`NEGLIGIBLE` it is taken as 0, and only the likeliest expert runs.

    Args:
        inputs: (T, D) float32.
        targets: (T, D).
        top_k: experts a token.
        seed: of the order of the tokens.
    """
    device = start.down.device
    experts = len(start.masks)
    scale = inputs.square().mean().sqrt().clamp_min(1e-12).to(device)
    gate_up = [matrix.clone().requires_grad_() for matrix in start.gate_up]
    down = [matrix.clone().requires_grad_() for matrix in start.down]
    router = (start.router * scale).requires_grad_()
    optimiser = torch.optim.Adam(
        [
            {"params": [*gate_up, *down], "lr": settings.learning_rate},
            {"params": [router], "lr": settings.router_learning_rate},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    steps = settings.steps

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 10) * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    energy = targets.square().sum(dim=-1).mean().clamp_min(1e-30).to(device)
    errors_of = partial(pair_errors, gate_up, down, act)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    batch = min(settings.batch, len(inputs))
    with torch.enable_grad():
        for _ in range(steps):
            if len(order) < batch:
                order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
            rows, order = order[:batch], order[batch:]
            x, y = inputs.index_select(0, rows).to(device), targets.index_select(0, rows).to(device)
            if experts == 1:
                every = torch.arange(len(x), device=device)
                loss = errors_of(x, y, tokens=every, experts=torch.zeros_like(every)).mean() / energy
            else:
                logits = x / scale @ router.T
                kind = Gates.renormalised if top_k == 1 else gates
                shares, chosen = gates_of(logits, kind, top_k=max(top_k, 2))
                if top_k == 1:
                    close = (shares[:, 1] >= NEGLIGIBLE).nonzero().squeeze(1)
                    found = errors_of(
                        x,
                        y,
                        tokens=torch.cat([torch.arange(len(x), device=device), close]),
                        experts=torch.cat([chosen[:, 0], chosen[close, 1]]),
                    )
                    errors, second = found.split([len(x), len(close)])
                    errors = errors.index_add(0, close, shares[close, 1] * (second - errors[close]))
                else:
                    training = ExpertLayer(start.masks, torch.stack(gate_up), torch.stack(down), router)
                    outputs = selected_outputs(training, act, x, chosen)
                    errors = ((outputs * shares[..., None]).sum(dim=1) - y).square().sum(dim=-1)
                loss = errors.mean() / energy
                if settings.balance:
                    probabilities = torch.softmax(logits, dim=-1)
                    penalty = overload(probabilities, chosen[:, :top_k], max_load=settings.max_load)
                    loss = loss + settings.balance * penalty
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return ExpertLayer(
        masks=start.masks,
        gate_up=torch.stack(gate_up).detach(),
        down=torch.stack(down).detach(),
        router=(router / scale).detach(),
    )
