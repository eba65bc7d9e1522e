"""Token-refined experts: against plain constructions, the stock block and hand-made problems."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dive.config import (
    Compensation,
    DistillationConfig,
    Metric,
    MoEConfig,
    PlainConfig,
    PruningConfig,
    RefinedConfig,
    Start,
)
from dive.errors import UserError
from dive.model.families import FFN, ffn, ffn_modules, moe_block
from dive.moe.assemble import assemble
from dive.moe.build import build_layers
from dive.moe.constructions import refined
from dive.moe.constructions.refined import derive_experts, first_assignment, renumbered, train_layer
from dive.moe.distill import expert_errors
from dive.moe.layer import ExpertLayer, expert_function, layer_output, likeliest_experts, pair_errors, selected_outputs
from dive.moe.walk import LayerTokens
from dive.pruning.calibrate import collect_statistics
from dive.pruning.statistics import sampled_rows
from dive.ranks import Share

Build = Callable[..., PreTrainedModel]
Tokens = Callable[..., Tensor]
HIDDEN, CHANNELS, TOKENS = 8, 24, 600
PRUNING = PruningConfig(ratio=0.5, width_multiple=1, metric=Metric.wifv, ridge=1e-3)


@pytest.fixture
def weights() -> FFN:
    draw = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=draw) / columns**0.5

    return FFN(matrix(CHANNELS, HIDDEN), matrix(CHANNELS, HIDDEN), matrix(HIDDEN, CHANNELS), torch.nn.SiLU())


@pytest.fixture
def inputs() -> Tensor:
    """Three clouds of tokens, so that experts have something to specialise in."""
    draw = torch.Generator().manual_seed(1)
    centres = 4.0 * torch.randn(3, HIDDEN, generator=draw)
    return centres.repeat(TOKENS // 3, 1) + torch.randn(TOKENS, HIDDEN, generator=draw)


def outputs(weights: FFN, rows: Tensor) -> Tensor:
    return weights.channels(rows) @ weights.down.T


def settings(experts: int = 3, top_k: int = 1, **changed: object) -> MoEConfig:
    """Nothing refined but what is named."""
    return MoEConfig(
        experts=experts,
        top_k=top_k,
        distillation=DistillationConfig(steps=60),
        refined=RefinedConfig(**{"rounds": 0, "sequential": False, "steps": 0, **changed}),  # type: ignore[arg-type]
    )


def refine(
    weights: FFN, inputs: Tensor, targets: Tensor, groups: Tensor, pruning: PruningConfig, moe: MoEConfig, *, seed: int
) -> ExpertLayer:
    return refined.layer(weights, LayerTokens(inputs, targets, Share.all_of(inputs), groups), pruning, moe, seed=seed)


def relative_error(layer: ExpertLayer, weights: FFN, rows: Tensor, top_k: int = 1) -> float:
    wanted = outputs(weights, rows)
    found = layer_output(layer, weights.act, rows, top_k=top_k)
    return float((found - wanted).square().sum() / wanted.square().sum())


def test_selected_outputs_are_the_experts_one_by_one(weights: FFN, inputs: Tensor) -> None:
    assignment = torch.arange(TOKENS) % 3
    layer = derive_experts(weights, inputs, outputs(weights, inputs), assignment, PRUNING, experts=3, seed=0)
    rows = inputs[:10]
    chosen = torch.tensor([[0, 1], [2, 0], [1, 1], [2, 2], [0, 2]] * 2)
    found = selected_outputs(layer, weights.act, rows, chosen)
    for token in range(10):
        for place in range(2):
            one = expert_function(layer, int(chosen[token, place]), weights.act)(rows[token : token + 1])[0]
            torch.testing.assert_close(found[token, place], one, rtol=1e-4, atol=1e-5)


def test_errors_of_pairs_are_the_experts_one_by_one(weights: FFN, inputs: Tensor) -> None:
    wanted = outputs(weights, inputs)
    layer = derive_experts(weights, inputs, wanted, torch.arange(TOKENS) % 3, PRUNING, experts=3, seed=0)
    tokens, experts = torch.tensor([4, 0, 4, 9, 2]), torch.tensor([2, 0, 0, 2, 0])  # and none for expert 1
    found = pair_errors(layer.gate_up, layer.down, weights.act, inputs, wanted, tokens=tokens, experts=experts)
    every = expert_errors(inputs, wanted, [expert_function(layer, e, weights.act) for e in range(3)])
    torch.testing.assert_close(found, every[tokens, experts], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_layers_output_is_the_stock_blocks(build: Build, tokens: Tokens, top_k: int) -> None:
    model = build()
    groups = [tokens(4, 16, seed=1), tokens(4, 16, seed=2), tokens(4, 16, seed=3)]
    moe = settings(top_k=top_k, rounds=1)
    layers = list(build_layers(model, groups, PruningConfig(ratio=0.5), moe, batch=4, seed=0))
    stock = assemble(model, layers, top_k=top_k)
    rows = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    for number in range(2):
        found = layer_output(layers[number], ffn(model, number).act, rows, top_k=top_k)
        torch.testing.assert_close(found, moe_block(stock, number)(rows[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", [Metric.wifv, Metric.obs])
def test_without_refinement_it_is_the_construction_from_statistics(
    build: Build, tokens: Tokens, metric: Metric
) -> None:
    model = build()
    domains = {"a": tokens(6, 16, seed=1), "b": tokens(6, 16, seed=2)}
    found = list(collect_statistics(model, domains).values())
    pruning = PruningConfig(ratio=0.5, metric=metric, ridge=0.01)
    moe = settings(experts=2)
    layers = list(build_layers(model, list(domains.values()), pruning, moe, batch=4, seed=0))
    plain = MoEConfig(experts=2, distillation=moe.distillation, plain=PlainConfig())
    for layer, expected in zip(layers, build_layers(model, found, pruning, plain, seed=0), strict=True):
        assert torch.equal(layer.masks, expected.masks)
        torch.testing.assert_close(layer.gate_up, expected.gate_up)
        torch.testing.assert_close(layer.down, expected.down, rtol=1e-3, atol=1e-3)


def test_rounds_and_steps_each_bring_the_layer_closer(weights: FFN, inputs: Tensor) -> None:
    targets, groups = outputs(weights, inputs), torch.arange(TOKENS) // 200  # groups that say nothing about the token
    pruning = PruningConfig(ratio=0.75, width_multiple=1)

    def error(**changed: object) -> float:
        layer = refine(weights, inputs, targets, groups, pruning, settings(**changed), seed=0)
        return relative_error(layer, weights, inputs)

    plain, rounds, both = error(), error(rounds=3), error(rounds=3, steps=100, batch=200)
    assert rounds < 0.9 * plain
    assert both < 0.7 * rounds


@pytest.mark.parametrize("top_k", [1, 2])
def test_steps_help_tokens_they_have_not_seen(weights: FFN, inputs: Tensor, top_k: int) -> None:
    targets, groups = outputs(weights, inputs), torch.arange(TOKENS) % 3
    pruning = PruningConfig(ratio=0.75, width_multiple=1)
    seen, unseen = slice(0, 450), slice(450, TOKENS)
    errors = []
    for steps in (0, 150):
        moe = settings(top_k=top_k, rounds=1, batch=150, steps=steps)
        layer = refine(weights, inputs[seen], targets[seen], groups[seen], pruning, moe, seed=0)
        errors.append(relative_error(layer, weights, inputs[unseen], top_k))
    assert errors[1] < 0.8 * errors[0]


def test_balance_keeps_the_load_below_its_limit(weights: FFN, inputs: Tensor) -> None:
    rows = torch.cat([inputs[0::3], inputs[0::3], inputs[0::3], inputs[1::3], inputs[2::3]])  # 3/5 of one kind
    groups = torch.arange(len(rows)) % 3
    loads = []
    for balance in (0.0, 1.0):
        moe = settings(rounds=1, steps=150, batch=500, balance=balance, max_load=1.2)
        layer = refine(weights, rows, outputs(weights, rows), groups, PRUNING, moe, seed=0)
        chosen = (rows @ layer.router.T).argmax(dim=1)
        loads.append(float(torch.bincount(chosen, minlength=3).max() * 3 / len(rows)))
    assert loads[0] > 1.4
    assert loads[1] < 1.35


def test_one_expert_needs_no_router(weights: FFN, inputs: Tensor) -> None:
    moe = settings(experts=1, rounds=2, steps=50, batch=200)
    targets, groups = outputs(weights, inputs), torch.zeros(TOKENS, dtype=torch.int64)
    trained = refine(weights, inputs, targets, groups, PRUNING, moe, seed=0)
    refitted = refine(weights, inputs, targets, groups, PRUNING, settings(experts=1, rounds=2), seed=0)
    assert not trained.router.any()
    assert relative_error(trained, weights, inputs) < relative_error(refitted, weights, inputs)


def test_a_step_goes_down_the_expected_error_of_the_two_likeliest_experts(
    weights: FFN, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = outputs(weights, inputs)
    start = derive_experts(weights, inputs, targets, torch.arange(TOKENS) % 3, PRUNING, experts=3, seed=0)
    start.router = 0.3 * torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(3))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in start.tensors().items() if name != "masks"}
    likeliest, chosen = (inputs @ leaves["router"].T).topk(2, dim=-1)
    gates = torch.softmax(likeliest, dim=-1)
    apart = selected_outputs(ExpertLayer(start.masks, **leaves), weights.act, inputs, chosen) - targets[:, None]
    (apart.square().sum(dim=-1) * gates).sum(dim=-1).mean().backward()

    step = RefinedConfig(steps=1, batch=TOKENS, balance=0.0)
    monkeypatch.setattr(refined, "NEGLIGIBLE", 0.0)
    trained = train_layer(start, weights.act, inputs, targets, step, top_k=1, seed=0).tensors()
    for name, leaf in leaves.items():  # Adam's first step is the learning rate against the gradient's sign
        assert leaf.grad is not None
        sure = leaf.grad.abs() > 1e-3 * leaf.grad.abs().max()
        assert torch.equal((trained[name] - leaf).sign()[sure], -leaf.grad.sign()[sure])

    monkeypatch.undo()  # a second expert that is all but excluded is worth nothing, and what stands for it is never read
    start.router = torch.tensor([100.0, -100.0, -100.0])[:, None] * torch.ones(HIDDEN)
    sure = inputs[inputs.sum(dim=1) > 1.0]
    found = train_layer(start, weights.act, sure, sure, step, top_k=1, seed=0)
    assert torch.equal(found.down[1:], start.down[1:])
    assert torch.equal(found.router, start.router)
    assert not torch.equal(found.down[0], start.down[0])


def test_an_expert_is_derived_from_so_many_of_its_tokens(weights: FFN, inputs: Tensor) -> None:
    targets, everything = outputs(weights, inputs), torch.zeros(TOKENS, dtype=torch.int64)
    some = sampled_rows(TOKENS, 300, seed=5)
    found = derive_experts(weights, inputs, targets, everything, PRUNING, experts=1, most=300, seed=5)
    expected = derive_experts(weights, inputs[some], targets[some], everything[:300], PRUNING, experts=1, seed=5)
    torch.testing.assert_close(found.down, expected.down)


def test_an_expert_without_tokens_starts_over(weights: FFN, inputs: Tensor) -> None:
    nobody = torch.zeros(TOKENS, dtype=torch.int64)
    layer = derive_experts(weights, inputs, outputs(weights, inputs), nobody, PRUNING, experts=3, seed=0)
    wanted = outputs(weights, inputs)
    errors = expert_errors(inputs, wanted, [expert_function(layer, e, weights.act) for e in range(3)]).mean(dim=0)
    assert float(errors.max() / errors.min()) < 2.0


def test_the_ridge_is_chosen_where_none_is_given(weights: FFN, inputs: Tensor) -> None:
    pruning = PruningConfig(ratio=0.5, width_multiple=1, ridge=None)
    found = derive_experts(
        weights, inputs, outputs(weights, inputs), torch.arange(TOKENS) % 3, pruning, experts=3, seed=0
    )
    assert relative_error(found, weights, inputs) < 1.0
    assert torch.isfinite(found.down).all()


def test_first_assignments(inputs: Tensor) -> None:
    groups = torch.arange(TOKENS) // 200
    assert torch.equal(first_assignment(inputs, groups, None, experts=3, seed=0), groups)
    assert not first_assignment(inputs, groups, None, experts=1, seed=0).any()
    dealt = first_assignment(inputs, None, Start.random, experts=3, seed=0)
    assert torch.bincount(dealt).min() > 150
    assert torch.equal(dealt, first_assignment(inputs, None, Start.random, experts=3, seed=0))
    clouds = torch.arange(TOKENS) % 3
    found = first_assignment(inputs, None, Start.kmeans, experts=3, seed=0)
    pairs = {(int(cloud), int(cluster)) for cloud, cluster in zip(clouds, found, strict=True)}
    assert len(pairs) == 3  # each cloud is one cluster
    assert torch.equal(found, first_assignment(inputs, None, None, experts=3, seed=0))


def test_clusters_are_numbered_like_the_experts_of_the_layer_before() -> None:
    before = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    found = torch.tensor([2, 2, 1, 0, 0, 2, 1, 1, 1, 0])
    # 2 shares two tokens with 0, 0 two with 1, 1 three with 2: seven of ten keep their number
    assert renumbered(found, before, experts=3).tolist() == [0, 0, 2, 1, 1, 0, 2, 2, 2, 1]
    assert renumbered(found, found, experts=3).tolist() == found.tolist()


def test_an_experts_number_stands_for_the_same_tokens_in_every_layer(build: Build, tokens: Tokens) -> None:
    model = build(num_hidden_layers=4)
    groups = [tokens(32, 16, seed=1)]
    moe = settings(start=Start.kmeans)
    model_inputs: list[torch.Tensor] = []
    for number in range(4):
        ffn_modules(model, number)[0].register_forward_pre_hook(
            lambda _, rows: model_inputs.append(rows[0].flatten(0, 1))
        )
    layers = list(build_layers(model, groups, PruningConfig(ratio=0.5), moe, batch=32, seed=0))
    model_inputs.clear()
    model(input_ids=groups[0])
    routed = [likeliest_experts(layer, rows) for layer, rows in zip(layers, model_inputs, strict=True)]
    for one, other in itertools.pairwise(routed):
        agreement = (one == other).double().mean()
        best = max((one == torch.tensor(order)[other]).double().mean() for order in itertools.permutations(range(3)))
        assert agreement >= best - 0.02  # routers do not follow the clusters to the token


def test_the_sequential_target_makes_up_for_the_layers_before(build: Build, tokens: Tokens) -> None:
    model = build(num_hidden_layers=5, initializer_range=0.15)
    groups = [tokens(16, 16, seed=1), tokens(16, 16, seed=2)]
    ids = torch.cat(groups)
    wanted = model.model(input_ids=ids).last_hidden_state
    distance = {}
    for name, moe in {
        "one shot": settings(experts=2),
        "sequential": settings(experts=2, sequential=True, correction=1.0),
    }.items():
        layers = list(build_layers(model, groups, PruningConfig(ratio=0.5, ridge=1e-3), moe, batch=8, seed=0))
        rebuilt = assemble(model, layers, top_k=1)
        distance[name] = float((rebuilt.model(input_ids=ids).last_hidden_state - wanted).square().mean())
    assert distance["sequential"] < 0.95 * distance["one shot"]


def test_the_same_seed_refines_to_the_same_layer(weights: FFN, inputs: Tensor) -> None:
    moe = settings(rounds=1, steps=20, batch=100)
    targets, groups = outputs(weights, inputs), torch.arange(TOKENS) % 3

    def layer(seed: int) -> ExpertLayer:
        return refine(weights, inputs, targets, groups, PRUNING, moe, seed=seed)

    one, again, other = layer(1), layer(1), layer(2)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
    assert not torch.equal(one.down, other.down)


def test_training_leaves_what_it_was_given_alone(weights: FFN, inputs: Tensor) -> None:
    layer = derive_experts(
        weights, inputs, outputs(weights, inputs), torch.arange(TOKENS) % 3, PRUNING, experts=3, seed=0
    )
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    trained = train_layer(
        layer, weights.act, inputs, outputs(weights, inputs), RefinedConfig(steps=3, batch=64), top_k=1, seed=0
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.tensors().items())
    assert not torch.equal(trained.down, layer.down)
    assert not trained.down.requires_grad


def test_groups_of_another_number_than_the_experts_are_refused(build: Build, tokens: Tokens) -> None:
    with pytest.raises(UserError, match=r"moe\.experts \(3\) differs from the 2 groups"):
        next(build_layers(build(), [tokens(4, 16), tokens(4, 16, seed=1)], PRUNING, settings(), seed=0))


def test_refined_experts_need_least_squares() -> None:
    with pytest.raises(UserError, match="least_squares"):
        PruningConfig(metric=Metric.obs, compensation=Compensation.bias)
