"""Experts refined on tokens, one layer at a time: k-means whose centroids are pruned FFNs, then local gradient steps.

Shapes: T tokens, D hidden width, F channels of the dense FFN, W channels of an expert, E experts, K experts a token.
"""

import math
from functools import partial

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dive.config import Gates, MoEConfig, PruningConfig, RefinedConfig, Start
from dive.model.families import FFN
from dive.moe.balance import overload
from dive.moe.clustering import kmeans, nearest
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
from dive.pruning.statistics import ChannelStatistics, batch_statistics, nothing, over_ranks, sampled_rows
from dive.ranks import ALONE, Ranks, Share, joined_pairs, summed

WALK = TokenWalk
KMEANS_TOKENS = 32768
ROUND_TOKENS = 4
"""Tokens a channel from which an expert is derived in the rounds before the last one: they only say which tokens it gets."""
NEGLIGIBLE = 0.01
"""Probability of a token's second expert below which a local step leaves it out: most tokens', once the router is sure."""


def layer(
    weights: FFN,
    tokens: LayerTokens,
    pruning: PruningConfig,
    moe: MoEConfig,
    *,
    seed: int,
    ranks: Ranks = ALONE,
) -> ExpertLayer:
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
    inputs, targets, share, element = tokens.inputs, tokens.targets, tokens.share, weights.gate.dtype
    weights = float32(weights)
    device = weights.down.device
    assignment = first_assignment(
        inputs, tokens.groups, settings.start, experts=moe.experts, seed=seed, share=share, device=device
    )
    if tokens.before is not None:
        assignment = renumbered(assignment, tokens.before, experts=moe.experts)
    sample = sampled_rows(share.count, moe.distillation.tokens, seed=seed)
    for last in [False] * (settings.rounds if moe.experts > 1 else 0) + [True]:
        most = None if last else ROUND_TOKENS * weights.down.shape[1]
        found = derive_experts(
            weights, inputs, targets, assignment, pruning, experts=moe.experts, most=most, seed=seed, share=share
        )
        if moe.experts == 1:
            break
        rows, wanted = share.take(inputs, sample).to(device), share.take(targets, sample).to(device)
        functions = [expert_function(found, e, weights.act) for e in range(moe.experts)]
        errors = expert_errors(rows, wanted, functions, ranks=ranks)
        found.router = fit_router(rows, errors, moe.distillation, seed=seed, ranks=ranks)
        if not last:
            assignment = share.whole(likeliest_experts(found, inputs))
    scaled = partial(scaled_to_gates, act=weights.act, inputs=inputs, targets=targets, top_k=moe.top_k, ranks=ranks)
    if moe.scales and moe.top_k > 1:  # of one expert the steps leave the gate out
        found = scaled(found)
    if settings.steps:
        found = train_layer(
            found, weights.act, inputs, targets, settings, top_k=moe.top_k, gates=moe.gates, seed=seed, share=share
        )
    return convert(scaled(found) if moe.scales else found, element)


def first_assignment(
    inputs: Tensor,
    groups: Tensor | None,
    start: Start | None,
    *,
    experts: int,
    seed: int,
    share: Share | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Expert of each token before the first round, (T,) int64 on the host: its group's, where there are any.

    Args:
        inputs: (t, D), of the tokens of this process.
        share: which these are; all if none.
        device: that clusters them; where they rest if none. One process finds the centres for all.
    """
    share = share or Share.all_of(inputs)
    if experts == 1:
        return torch.zeros(share.count, dtype=torch.int64)
    if groups is not None:
        return groups
    if start is Start.random:
        return torch.randint(experts, (share.count,), generator=torch.Generator().manual_seed(seed))
    device = device or inputs.device
    sampled = share.take(inputs, sampled_rows(share.count, KMEANS_TOKENS, seed=seed))
    centres = torch.empty(experts, inputs.shape[1], dtype=inputs.dtype, device=device)
    if share.ranks.owns(0):
        centres = kmeans(sampled.to(device), experts, seed=seed)
    centres = share.ranks.from_owner(0, centres)
    return share.whole(torch.cat([nearest(part.to(device), centres).cpu() for part in inputs.split(CHUNK)]))


def renumbered(assignment: Tensor, other: Tensor, *, experts: int) -> Tensor:
    """The assignment (T,), its experts numbered so that as many tokens as can be have the number that ``other`` gives them."""
    together = torch.bincount(assignment * experts + other, minlength=experts**2).view(experts, experts)
    _, number = linear_sum_assignment(together.numpy(), maximize=True)
    return torch.from_numpy(number)[assignment]


def token_statistics(weights: FFN, inputs: Tensor, targets: Tensor, rows: Tensor) -> tuple[ChannelStatistics, Tensor]:
    """(statistics with second moments, Σ y xᵀ (D, F)) of some rows: x the FFN's channels, y the target."""
    device, (hidden, channels) = weights.down.device, weights.down.shape
    merged = ChannelStatistics(0, torch.empty(0), torch.empty(0))
    cross = torch.zeros_like(weights.down)
    for part in rows.split(CHUNK):
        values = weights.channels(inputs.index_select(0, part).to(device))
        merged += batch_statistics(values, second_moment=True, inputs=None)
        cross += targets.index_select(0, part).to(device).T @ values
    return merged if merged.count else nothing(channels, hidden, device, second_moment=True), cross


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
    share: Share | None = None,
) -> ExpertLayer:
    """One pruned and refitted FFN for each expert's tokens, or of ``most`` of them; the routers are zero.

    One expert's moments are alive at a time, in the process that owns it. An expert with fewer tokens than channels to keep
    starts over from random ones, as k-means does.

    Args:
        inputs: (t, D), of the tokens of this process.
        targets: (t, D).
        assignment: expert of each token, (T,) int64.
        share: which tokens are this process's; all if none.
    """
    share = share or Share.all_of(inputs)
    ranks, (hidden, channels) = share.ranks, weights.down.shape
    width = pruning.width(channels)

    def rows_of(expert: int) -> Tensor:
        rows = (assignment == expert).nonzero().squeeze(1)
        if len(rows) < width:
            return sampled_rows(share.count, max(share.count // experts, 1), seed=seed + expert)
        if most is not None and len(rows) > most:
            return rows[sampled_rows(len(rows), most, seed=seed + expert)]
        return rows

    def moments(expert: int, rows: Tensor) -> tuple[ChannelStatistics, Tensor] | None:
        """Of the rows of all processes; none but for the expert's owner."""
        statistics, cross = token_statistics(weights, inputs, targets, share.own(rows))
        owner = ranks.owner(expert)
        statistics, cross = over_ranks(statistics, ranks, owner=owner), ranks.sum_at(owner, cross)
        return (statistics, cross) if ranks.owns(expert) else None

    kept = list(torch.zeros(experts, channels, dtype=torch.bool))
    refitted = [weights.down.new_empty(hidden, width) for _ in range(experts)]
    for first in range(0, experts, ranks.count):  # as many at once as there are processes: each has one of its own
        several, expert = range(first, min(first + ranks.count, experts)), first + ranks.rank
        rows = {each: rows_of(each) for each in several}
        held = {
            each: held_out(len(found)) if pruning.ridge is None else torch.zeros(len(found), dtype=torch.bool)
            for each, found in rows.items()
        }
        fit: tuple[ChannelStatistics, Tensor] | None = None
        for each in several:
            fit = moments(each, rows[each][~held[each]]) or fit
        if fit is not None:
            kept[expert] = choose_channels(pruning, weights, fit[0], width=width, cross=fit[1], seed=seed + expert)
        other: tuple[ChannelStatistics, Tensor] | None = None
        if pruning.ridge is None:
            for each in several:
                other = moments(each, rows[each][held[each]]) or other
        if fit is not None:
            refitted[expert] = _refit(weights.down, kept[expert], fit, other, pruning.ridge)
        del fit, other
    kept, refitted = ranks.from_owners(kept), ranks.from_owners(refitted)
    return ExpertLayer(
        masks=torch.stack(kept),
        gate_up=torch.stack([torch.cat([weights.gate[mask], weights.up[mask]]) for mask in kept]),
        down=torch.stack(refitted),
        router=weights.gate.new_zeros(experts, weights.gate.shape[1]),
    )


def _refit(
    down: Tensor,
    chosen: Tensor,
    fit: tuple[ChannelStatistics, Tensor],
    other: tuple[ChannelStatistics, Tensor] | None,
    ridge: float | None,
) -> Tensor:
    """(D, W), from moments and crosses of an expert's tokens; where no ridge is given, the best one for the others of them."""
    moment, cross = _moment(fit[0]), fit[1]
    if ridge is None:
        assert other is not None
        beside, beside_cross = _moment(other[0]), other[1]
        ridge = choose_ridge(down, moment, beside, chosen, cross=(cross, beside_cross))
        moment, cross = moment + beside, cross + beside_cross
    return least_squares(down, moment, chosen, ridge=ridge, cross=cross)


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
    share: Share | None = None,
) -> ExpertLayer:
    """Gradient steps on one layer's experts and router against its targets, in float32.

    With K > 1 the loss is the squared error of the block's output. With K = 1 its gate is constant, or taken for 1, so the
    loss is the expected error over the two likeliest experts, Σ p_k ‖y − expert_k(x)‖²: its minimum sends each token to the
    better one.
    Where p_2 is less than :data:`NEGLIGIBLE` it is taken as 0, and only the likeliest expert runs.

    Processes that compute together divide the experts, not the tokens: rows and errors of a step are less to tell each other
    than gradients are, and each owner alone has its experts' optimiser states. All train the router, on the same errors.

    Args:
        inputs: (t, D) float32, of the tokens of this process.
        targets: (t, D).
        top_k: experts a token.
        seed: of the order of the tokens.
        share: which tokens are this process's; all if none.
    """
    share = share or Share.all_of(inputs)
    ranks, device = share.ranks, start.down.device
    experts = len(start.masks)
    scale = share.mean(inputs.square()).sqrt().clamp_min(1e-12).to(device)
    gate_up = [matrix.clone().requires_grad_(ranks.owns(number)) for number, matrix in enumerate(start.gate_up)]
    down = [matrix.clone().requires_grad_(ranks.owns(number)) for number, matrix in enumerate(start.down)]
    router = (start.router * scale).requires_grad_()
    optimiser = torch.optim.Adam(
        [
            {"params": [m for m in (*gate_up, *down) if m.requires_grad], "lr": settings.learning_rate},
            {"params": [router], "lr": settings.router_learning_rate},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    steps = settings.steps

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 10) * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    energy = share.mean(targets.square().sum(dim=-1)).clamp_min(1e-30).to(device)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    batch = min(settings.batch, share.count)

    def errors_of(x: Tensor, y: Tensor, *, tokens: Tensor, experts: Tensor) -> Tensor:
        """Of pairs, each by its expert's owner."""
        errors_at = partial(pair_errors, gate_up, down, act, x, y)
        if ranks.count == 1:
            return errors_at(tokens=tokens, experts=experts)
        own = (experts % ranks.count == ranks.rank).nonzero().squeeze(1)
        return joined_pairs(errors_at(tokens=tokens[own], experts=experts[own]), own, len(experts), ranks)

    with torch.enable_grad():
        for _ in range(steps):
            if len(order) < batch:
                order = torch.cat([order, torch.randperm(share.count, generator=generator)])
            rows, order = order[:batch], order[batch:]
            x, y = (share.take(matrix, rows, ordered=False).to(device) for matrix in (inputs, targets))
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
                    own = chosen % ranks.count == ranks.rank
                    outputs = selected_outputs(training, act, x, chosen, own=None if ranks.count == 1 else own)
                    mixed = summed((outputs * shares[..., None]).sum(dim=1), ranks)
                    errors = (mixed - y).square().sum(dim=-1)
                loss = errors.mean() / energy
                if settings.balance:
                    probabilities = torch.softmax(logits, dim=-1)
                    penalty = overload(probabilities, chosen[:, :top_k], max_load=settings.max_load)
                    loss = loss + settings.balance * penalty / (1 if top_k == 1 else ranks.count)
            optimiser.zero_grad()
            loss.backward()
            if top_k > 1 and router.grad is not None:  # of the pairs that were computed here
                ranks.sum(router.grad)
            optimiser.step()
            schedule.step()
            ranks.from_owner(0, router.detach())  # or rounding would part them in time
    return ExpertLayer(
        masks=start.masks,
        gate_up=torch.stack(ranks.from_owners([matrix.detach() for matrix in gate_up])),
        down=torch.stack(ranks.from_owners([matrix.detach() for matrix in down])),
        router=(router / scale).detach(),
    )
