"""From a dense model to a Mixture-of-Experts, for every family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dive.affinity.matrix import pruned_in_place
from dive.api import reconstruct
from dive.config import (
    CoactivationConfig,
    Compensation,
    ConstructionConfig,
    DistillationConfig,
    MoEConfig,
    PlainConfig,
    PruningConfig,
    RandomSplitConfig,
    RefinedConfig,
    RouterInit,
    UpcycleConfig,
)
from dive.errors import UserError
from dive.model.families import copy_shared_weights, decoder_layers, ffn, moe_block, moe_class
from dive.moe.assemble import assemble
from dive.moe.build import build_layers
from dive.moe.constructions.random_split import split_masks
from dive.moe.distill import expert_errors, fit_router
from dive.moe.layer import ExpertLayer, expert_function
from dive.pruning.calibrate import collect_statistics
from dive.pruning.metrics import keep_masks
from dive.pruning.statistics import ChannelStatistics

Tokens = Callable[..., Tensor]
DEAD = 8
"""Channels of 48 that never fire in the models that :func:`silence` returns."""


def silence(model: PreTrainedModel) -> PreTrainedModel:
    """Zero rows of ``up_proj``: those channels are 0 whatever the input, so that pruning them changes nothing."""
    for layer in range(len(decoder_layers(model))):
        ffn(model, layer).up[5 : 5 + 5 * DEAD : 5] = 0.0
    return model


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def groups_of(model: PreTrainedModel, tokens: Tokens, count: int = 3) -> list[ChannelStatistics]:
    return list(collect_statistics(model, {str(i): tokens(3, 16, seed=i) for i in range(count)}).values())


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("compensation", ["least_squares", "bias", "none"])
def test_experts_without_the_channels_that_never_fire_are_the_dense_model(
    dense: PreTrainedModel, tokens: Tokens, compensation: str, top_k: int
) -> None:
    silence(dense)
    moe = reconstruct(
        dense, groups_of(dense, tokens), ratio=DEAD / 48, top_k=top_k, compensation=compensation, router_init="random"
    )
    assert type(moe) is moe_class(moe.config)
    assert moe_block(moe, 0).experts.down_proj.shape == (3, 32, 48 - DEAD)
    ids = tokens(3, 20, seed=9)
    # The ridge draws the refit towards the weights that were there, so it is exact too.
    torch.testing.assert_close(logits(moe, ids), logits(dense, ids), rtol=1e-3, atol=2e-3)
    generated = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(moe.generate(ids[:1, :8], **generated), dense.generate(ids[:1, :8], **generated))


def test_the_dense_model_is_left_as_it_was(dense: PreTrainedModel, tokens: Tokens) -> None:
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    moe = reconstruct(dense, groups_of(dense, tokens), ratio=0.5)
    for parameter in moe.parameters():
        parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())


def test_everything_but_the_ffns_is_the_dense_models(dense: PreTrainedModel, tokens: Tokens) -> None:
    moe = reconstruct(dense, groups_of(dense, tokens), ratio=0.5, top_k=2)
    source = dense.state_dict()
    for name, tensor in moe.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(tensor, source[name]), name
    tied = dense.config.tie_word_embeddings
    assert (moe.lm_head.weight is moe.model.embed_tokens.weight) is tied
    assert moe.lm_head.weight.data_ptr() != dense.lm_head.weight.data_ptr()
    for name in ("num_key_value_heads", "rope_parameters", "rms_norm_eps", "head_dim", "max_position_embeddings"):
        assert getattr(moe.config, name, None) == getattr(dense.config, name, None), name
    assert moe.config.num_experts_per_tok == 2
    assert not any(parameter.requires_grad for parameter in moe.parameters())


def test_a_tensor_without_counterpart_is_refused(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    qwen = reconstruct(build("qwen3", head_dim=8), groups_of(build("qwen3", head_dim=8), tokens), ratio=0.5)
    with pytest.raises(ValueError, match=r"_norm\.weight of Qwen3MoeForCausalLM is not in LlamaForCausalLM"):
        copy_shared_weights(build("llama"), qwen)


def test_one_expert_with_the_bias_is_the_pruned_dense_model(dense: PreTrainedModel, tokens: Tokens) -> None:
    [statistics] = groups_of(dense, tokens, 1)
    moe = reconstruct(dense, [statistics], ratio=0.5, compensation="bias")
    masks = keep_masks(dense, statistics, ratio=0.5)
    ids = tokens(2, 12, seed=9)
    with pruned_in_place(dense, masks, statistics.mean):
        expected = logits(dense, ids)
    torch.testing.assert_close(logits(moe, ids), expected, rtol=1e-3, atol=1e-3)


def test_bias_compensation_by_hand(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    model = build()
    groups = groups_of(model, tokens)
    moe = reconstruct(model, groups, ratio=0.5, top_k=2, compensation="bias", router_init="random")
    block, weights = moe_block(moe, 1), ffn(model, 1)
    rows = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    scores = torch.softmax(rows @ block.gate.weight.T, dim=-1)
    expected = torch.zeros_like(rows)
    for t, row in enumerate(rows):
        best = scores[t].topk(2)
        for gate, e in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
            mask = keep_masks(model, groups[e], ratio=0.5)[1]
            channels = torch.nn.functional.silu(weights.gate @ row) * (weights.up @ row)
            filled = torch.where(mask, channels, groups[e].mean[1].float())
            expected[t] += gate * (weights.down @ filled)
    with torch.no_grad():
        torch.testing.assert_close(block(rows[None])[0], expected, rtol=1e-3, atol=1e-3)


def test_each_expert_is_pruned_on_its_own_group(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    model = build()
    groups = groups_of(model, tokens)
    pruning = PruningConfig(ratio=0.5, compensation=Compensation.none)
    moe = MoEConfig(experts=3, plain=PlainConfig(router_init=RouterInit.random))
    layers = list(build_layers(model, groups, pruning, moe, seed=0))
    for number, layer in enumerate(layers):
        for expert, group in enumerate(groups):
            mask = keep_masks(model, group, ratio=0.5)[number]
            weights = ffn(model, number)
            assert torch.equal(layer.masks[expert], mask)
            assert torch.equal(layer.gate_up[expert], torch.cat([weights.gate[mask], weights.up[mask]]))
            assert torch.equal(layer.down[expert], weights.down[:, mask])
    assert not torch.equal(layers[0].masks[0], layers[0].masks[1])
    assert not torch.equal(layers[0].router, layers[1].router)
    assert torch.equal(moe_block(assemble(model, layers, top_k=1), 1).experts.down_proj, layers[1].down)


def test_least_squares_comes_closer_than_bias_and_nothing(
    build: Callable[..., PreTrainedModel], tokens: Tokens
) -> None:
    model = build()
    [group] = groups_of(model, tokens, 1)
    assert group.inputs is not None
    weights = ffn(model, 0)
    errors = {}
    for compensation in Compensation:
        pruning = PruningConfig(ratio=0.5, compensation=compensation)
        layer = next(build_layers(model, [group], pruning, MoEConfig(experts=1, plain=PlainConfig()), seed=0))
        errors[compensation] = float(
            expert_errors(
                group.inputs[0],
                weights.channels(group.inputs[0]) @ weights.down.T,
                [expert_function(layer, 0, weights.act)],
            ).mean()
        )
    assert errors[Compensation.least_squares] < errors[Compensation.bias] <= errors[Compensation.none]


# ------------------------------------------------------------------------------------------------- constructions


@pytest.mark.parametrize(
    ("width", "experts", "uses"),
    [(12, 4, {1}), (12, 3, {0, 1}), (24, 4, {2}), (20, 5, {2, 3}), (48, 2, {2}), (47, 3, {2, 3}), (1, 1, {0, 1})],
)
def test_random_split_uses_channels_evenly(width: int, experts: int, uses: set[int]) -> None:
    masks = split_masks(48, width, experts, seed=0)
    assert masks.sum(dim=1).tolist() == [width] * experts
    # width · experts / 48 uses a channel, rounded down or up; at most one: disjoint.
    assert set(masks.sum(dim=0).tolist()) == uses
    assert torch.equal(masks, split_masks(48, width, experts, seed=0))
    if width < 48:
        assert not torch.equal(masks, split_masks(48, width, experts, seed=1))


def constructed(
    model: PreTrainedModel, groups: list[ChannelStatistics], settings: ConstructionConfig, name: str, **pruning: Any
) -> ExpertLayer:
    moe = MoEConfig(experts=4, **{name: settings})  # type: ignore[arg-type]
    return next(build_layers(model, groups, PruningConfig(ratio=0.75, width_multiple=1, **pruning), moe, seed=3))


def test_upcycled_experts_are_identical(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    model = build()
    groups = groups_of(model, tokens)
    layer = constructed(model, groups, UpcycleConfig(), "upcycle")
    union = sum(groups)
    assert isinstance(union, ChannelStatistics)
    assert torch.equal(layer.masks[0], keep_masks(model, union, ratio=0.75, width_multiple=1)[0])
    for tensor in (layer.masks, layer.gate_up, layer.down):
        assert len(tensor) == 4
        assert all(torch.equal(tensor[0], other) for other in tensor)


def test_random_split_is_disjoint_and_scaled_back(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    model = build()
    groups = groups_of(model, tokens)
    layer = constructed(model, groups, RandomSplitConfig(), "random_split", compensation=Compensation.none)
    assert layer.masks.sum(dim=0).tolist() == [1] * 48
    down = ffn(model, 0).down
    for mask, found in zip(layer.masks, layer.down, strict=True):
        assert torch.equal(found, down[:, mask] * 4)  # 48 / 12
    # With every expert active at a quarter each, the scaled experts add up to the dense FFN.
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    act = ffn(model, 0).act
    total = sum(expert_function(layer, e, act)(rows) for e in range(4)) / 4
    torch.testing.assert_close(total, ffn(model, 0).channels(rows) @ down.T, rtol=1e-4, atol=1e-4)


ONE_SHOT = {
    "refined": RefinedConfig(steps=4),
    "plain": PlainConfig(shared=0.25),
    "random_split": RandomSplitConfig(router_init=RouterInit.distilled),
    "coactivation": CoactivationConfig(),
    "upcycle": UpcycleConfig(),
}


@pytest.mark.parametrize("ridge", [0.01, None])
@pytest.mark.parametrize("name", ONE_SHOT)
def test_a_construction_goes_on_after_finished_layers(
    build: Callable[..., PreTrainedModel], tokens: Tokens, name: str, ridge: float | None
) -> None:
    model = build(num_hidden_layers=3)
    groups = [tokens(6, 16, seed=1), tokens(5, 16, seed=2)] if name == "plain" else [tokens(11, 16, seed=1)]
    moe = MoEConfig(experts=2, distillation=DistillationConfig(steps=10), **{name: ONE_SHOT[name]})  # type: ignore[arg-type]

    def build_after(finished: list[ExpertLayer]) -> list[ExpertLayer]:
        pruning = PruningConfig(ratio=0.5, ridge=ridge)
        return list(build_layers(model, groups, pruning, moe, batch=4, seed=0, finished=finished))

    whole = build_after([])
    rest = build_after(whole[:2])
    assert (len(whole), len(rest)) == (3, 1)
    for tensor, other in zip(whole[2].tensors().values(), rest[0].tensors().values(), strict=True):
        assert torch.equal(tensor, other)


def test_statistics_given_and_taken_on_the_way_are_the_same(
    build: Callable[..., PreTrainedModel], tokens: Tokens
) -> None:
    model = build()
    matrices = [tokens(3, 16, seed=i) for i in range(3)]
    moe = MoEConfig(experts=3, plain=PlainConfig())
    ways = [
        list(build_layers(model, groups, PruningConfig(ratio=0.5), moe, seed=0))
        for groups in (matrices, groups_of(model, tokens))
    ]
    for one, other in zip(*ways, strict=True):
        assert torch.equal(one.masks, other.masks)
        assert torch.equal(one.down, other.down)


def test_a_single_expert_has_nothing_to_route(dense: PreTrainedModel, tokens: Tokens) -> None:
    moe = reconstruct(dense, groups_of(dense, tokens, 1), ratio=0.5, top_k=1)
    assert moe.config.num_experts == 1
    assert not moe_block(moe, 0).gate.weight.any()
    found = logits(moe, tokens(2, 10))
    assert torch.isfinite(found).all()
    assert found.std() > 0


# ------------------------------------------------------------------------------------------------------- routers


def test_expert_errors_by_hand() -> None:
    rows = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    found = expert_errors(rows, rows, [lambda x: 0 * x, lambda x: 3 * x])
    assert found.tolist() == [[5.0, 20.0], [1.0, 4.0]]  # ‖x‖² and ‖2 x‖²


def test_a_router_is_fitted_to_separable_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 7 * torch.randn(400, 8, generator=generator)
    best = (rows @ torch.randn(8, 3, generator=generator)).argmax(dim=1)
    weight = fit_router(rows, 1.0 - torch.nn.functional.one_hot(best, 3).float(), DistillationConfig(steps=200), seed=0)
    assert weight.shape == (3, 8)
    assert float(((rows @ weight.T).argmax(dim=1) == best).float().mean()) > 0.95


def test_a_router_minimises_the_error_and_not_the_number_of_mistakes() -> None:
    # Indistinguishable tokens: three of four prefer expert 0 by 1, the fourth expert 1 by 10. Always expert 1 costs 3 / 4
    # a token, always expert 0 costs 10 / 4.
    rows = torch.ones(400, 4)
    errors = torch.tensor([[0.0, 1.0]] * 3 + [[10.0, 0.0]]).repeat(100, 1)
    weight = fit_router(rows, errors, DistillationConfig(steps=200), seed=0)
    assert (rows @ weight.T).argmax(dim=1).unique().tolist() == [1]


def test_a_distilled_router_beats_a_random_one(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    model = build()
    groups = groups_of(model, tokens)
    error = {}
    for start in RouterInit:
        total = torch.zeros(())
        moe = MoEConfig(experts=3, plain=PlainConfig(router_init=start))
        for number, layer in enumerate(build_layers(model, groups, PruningConfig(ratio=0.75), moe, seed=0)):
            weights = ffn(model, number)
            inputs = torch.cat([g.inputs[number] for g in groups if g.inputs is not None])
            errors = expert_errors(
                inputs,
                weights.channels(inputs) @ weights.down.T,
                [expert_function(layer, e, weights.act) for e in range(3)],
            )
            chosen = (inputs @ layer.router.T).argmax(dim=1)
            total += errors.gather(1, chosen[:, None]).mean() / errors.mean()
        error[start] = float(total)
    assert error[RouterInit.distilled] < 0.95 * error[RouterInit.random]


def test_the_same_seed_builds_the_same_model(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    model = build()
    groups = groups_of(model, tokens)
    one, again, other = (
        reconstruct(model, groups, ratio=0.5, router_init="random", seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.0}, r"pruning\.ratio"),
        ({"ratio": 0.5, "top_k": 3}, r"moe\.top_k \(3\) must not exceed moe\.experts \(2\)"),
        ({"ratio": 0.5, "metric": "l1"}, r"metric='l1': choose one of"),
        ({"ratio": 0.5, "compensation": "obs"}, r"compensation='obs'"),
        ({"ratio": 0.5, "router_init": "zero"}, r"router_init='zero'"),
        (
            {"ratio": 0.5, "experts": 3},
            r"moe\.plain builds an expert of each group: moe\.experts \(3\) .* the 2 groups",
        ),
        ({"overrides": ["moe=default", "pruning.metric=obs"]}, r"moe\.refined needs the tokens themselves"),
        ({"overrides": ["moe=upcycle"], "router_init": "random"}, r"router_init goes with moe=plain"),
    ],
)
def test_settings_that_contradict_are_refused(
    build: Callable[..., PreTrainedModel], tokens: Tokens, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        reconstruct(build(), groups_of(build(), tokens, 2), **settings)


def test_statistics_that_lack_something_are_refused(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    model = build()
    bare = list(
        collect_statistics(model, {"a": tokens(2, 8), "b": tokens(2, 8)}, second_moments=False, inputs=0).values()
    )
    with pytest.raises(UserError, match="second_moments=True"):
        reconstruct(model, bare, ratio=0.5)
    with pytest.raises(UserError, match="inputs=2048"):
        reconstruct(model, bare, ratio=0.5, compensation="none")
    with pytest.raises(UserError, match="groups is empty"):
        reconstruct(model, [], ratio=0.5)
