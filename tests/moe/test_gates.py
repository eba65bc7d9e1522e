"""Experts under gates that do not sum to one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dive.api import reconstruct
from dive.config import Gates
from dive.errors import UserError
from dive.model.families import ffn, moe_block
from dive.model.families.twin import Form
from dive.moe.assemble import assemble
from dive.moe.gates import scaled_to_gates
from dive.moe.layer import ExpertLayer, expert_function, layer_output
from dive.pruning.calibrate import collect_statistics

Build = Callable[..., PreTrainedModel]
Tokens = Callable[..., Tensor]
PROBABILITIES = ("model.twin=qwen2_moe", "moe.gates=probabilities")


def made(experts: int, *, bias: bool = False) -> ExpertLayer:
    """Random experts of 4 channels on 6 hidden ones; the last is never the likeliest."""
    generator = torch.Generator().manual_seed(0)
    router = torch.randn(experts, 6, generator=generator)
    router[-1] = 0.5 * router[0] + 0.5 * router[1]
    return ExpertLayer(
        masks=torch.ones(experts, 4, dtype=torch.bool),
        gate_up=torch.randn(experts, 8, 6, generator=generator),
        down=torch.randn(experts, 6, 4, generator=generator),
        router=router,
        bias=torch.randn(experts, 6, generator=generator) if bias else None,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_scales_are_the_least_squares_of_the_blocks_output(top_k: int, bias: bool) -> None:
    layer, act = made(4, bias=bias), nn.SiLU()
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(500, 6, generator=generator), torch.randn(500, 6, generator=generator)
    found = scaled_to_gates(layer, act, inputs, targets, top_k=top_k)

    probabilities = torch.softmax(inputs @ layer.router.T, dim=-1)
    gates, chosen = probabilities.topk(top_k, dim=-1)
    outputs = torch.stack([expert_function(layer, e, act)(inputs) for e in range(4)])  # (E, T, D)
    weights = torch.zeros(500, 4).scatter(1, chosen, gates)
    columns = (outputs * weights.T[..., None]).flatten(1).double().T  # (T · D, E)
    used = columns.any(dim=0)
    assert used.sum() == (3 if top_k == 1 else 4)
    scales = torch.linalg.lstsq(columns[:, used], targets.flatten().double()[:, None]).solution[:, 0]
    torch.testing.assert_close(
        found.down[used], layer.down[used] * scales[:, None, None].float(), rtol=1e-2, atol=1e-3
    )  # the ridge
    if top_k == 1:
        whole = columns.sum(dim=1)
        common = float(whole @ targets.flatten().double() / columns.square().sum())
        torch.testing.assert_close(found.down[3], layer.down[3] * common)
    if found.bias is not None and layer.bias is not None:
        torch.testing.assert_close(found.bias / layer.bias, (found.down / layer.down)[:, :, 0])
    for name in ("gate_up", "router", "masks"):
        assert getattr(found, name) is getattr(layer, name)


def test_experts_that_are_alike_share_one_scale() -> None:
    layer = made(3)
    layer = ExpertLayer(
        layer.masks, layer.gate_up[:1].expand(3, -1, -1), layer.down[:1].expand(3, -1, -1), layer.router * 0
    )
    inputs = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
    targets = expert_function(layer, 0, nn.SiLU())(inputs)
    found = scaled_to_gates(layer, nn.SiLU(), inputs, targets, top_k=2)  # two of three, a third each
    torch.testing.assert_close(found.down, layer.down * 1.5)


def test_in_bfloat16() -> None:
    layer = made(3)
    inputs = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
    wanted = scaled_to_gates(layer, nn.SiLU(), inputs, inputs, top_k=1)
    half = ExpertLayer(layer.masks, layer.gate_up.bfloat16(), layer.down.bfloat16(), layer.router.bfloat16())
    found = scaled_to_gates(half, nn.SiLU(), inputs.bfloat16(), inputs.bfloat16(), top_k=1)
    assert found.down.dtype == torch.bfloat16
    torch.testing.assert_close(found.down.float(), wanted.down, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("construction", ["default", "plain", "random_split", "coactivation", "upcycle"])
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_every_construction_is_nearly_what_it_is_under_gates_of_one(
    build: Build, tokens: Tokens, variant: str, construction: str, top_k: int
) -> None:
    dense = build(variant)
    groups = [tokens(16, 16, seed=seed) for seed in (range(3) if construction == "plain" else (0,))]
    text = groups if construction == "plain" else {"all": groups[0]}
    chosen = (*(PROBABILITIES if variant == "llama" else PROBABILITIES[1:]), f"moe={construction}")
    settings = ["moe.distillation.steps=60", *(["moe.refined.steps=20"] if construction == "default" else [])]
    metric = [] if construction == "default" else ["pruning.metric=wifv"]
    models = {
        gates: reconstruct(dense, text, [*overrides, *settings, *metric], ratio=0.5, experts=3, top_k=top_k)
        for gates, overrides in (("one", [f"moe={construction}"]), ("probabilities", chosen))
    }
    rows = torch.randn(400, 32, generator=torch.Generator().manual_seed(3))
    weights = ffn(dense, 0)
    wanted = weights.channels(rows) @ weights.down.T
    errors = {}
    for name, model in models.items():
        with torch.no_grad():
            found = moe_block(model, 0)(rows[None])[0]
        errors[name] = float((found - wanted).square().sum() / wanted.square().sum())
    assert models["probabilities"].config.norm_topk_prob is False
    assert errors["probabilities"] < 1.25 * errors["one"]


def test_the_layers_output_is_the_stock_blocks(build: Build, tokens: Tokens) -> None:
    dense = build("llama")
    layer = ExpertLayer(
        masks=torch.ones(3, 48, dtype=torch.bool),
        gate_up=torch.randn(3, 96, 32, generator=torch.Generator().manual_seed(0)),
        down=torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(1)),
        router=torch.randn(3, 32, generator=torch.Generator().manual_seed(2)) * 0.1,
    )
    rows = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    for gates in Gates:
        stock = assemble(dense, [layer, layer], top_k=2, form=Form(twin="qwen2_moe", gates=gates))
        found = layer_output(layer, ffn(dense, 0).act, rows, top_k=2, gates=gates)
        torch.testing.assert_close(found, moe_block(stock, 0)(rows[None])[0], rtol=1e-4, atol=1e-4)


def test_one_expert_has_nothing_to_make_up_for(build: Build, tokens: Tokens) -> None:
    model = reconstruct(
        build("llama"), {"all": tokens(8, 16)}, [*PROBABILITIES, "moe.refined.steps=0"], experts=1, ratio=0.5
    )
    other = reconstruct(build("llama"), {"all": tokens(8, 16)}, ["moe.refined.steps=0"], experts=1, ratio=0.5)
    assert torch.equal(moe_block(model, 0).experts.down_proj, moe_block(other, 0).experts.down_proj)


def test_statistics_without_inputs_are_refused(build: Build, tokens: Tokens) -> None:
    dense = build("llama")
    statistics = list(collect_statistics(dense, {"a": tokens(2, 16), "b": tokens(2, 16, seed=1)}, inputs=0).values())
    with pytest.raises(UserError, match=r"^moe.gates=probabilities needs FFN inputs"):
        reconstruct(dense, statistics, list(PROBABILITIES), ratio=0.5, router_init="random")


@pytest.mark.parametrize("overrides", [["moe.gates=probabilities"], ["moe.gates=probabilities", "model.twin=mixtral"]])
def test_mixtral_has_no_place_for_them(build: Build, tokens: Tokens, overrides: list[str]) -> None:
    with pytest.raises(
        UserError,
        match=r"^moe.gates=probabilities has no place in mixtral, .*; set model.twin=qwen2_moe, or moe.gates=",
    ):
        reconstruct(build("llama"), {"all": tokens(2, 16)}, overrides, experts=2, ratio=0.5)
