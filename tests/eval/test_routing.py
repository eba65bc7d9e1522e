"""Routing shares and overlap, by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dive.api import reconstruct
from dive.eval.routing import Routing, experts_of_tokens, mask_overlap, routing_share
from dive.model.families import decoder_layers, moe_block
from dive.moe.plug import plug_routers
from dive.pruning.calibrate import collect_statistics


@pytest.fixture(params=["llama", "qwen3"])
def moe(
    request: pytest.FixtureRequest, build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor]
) -> PreTrainedModel:
    dense = build(request.param)
    statistics = collect_statistics(dense, {str(i): tokens(2, 12, seed=i) for i in range(3)})
    return reconstruct(dense, list(statistics.values()), ratio=0.5, top_k=2, router_init="random")


@pytest.mark.parametrize("plugged", [False, True])
def test_shares_are_those_of_the_router_logits(
    moe: PreTrainedModel, tokens: Callable[..., Tensor], plugged: bool
) -> None:
    windows = {"a": tokens(3, 10, seed=7), "b": tokens(1, 5, seed=8)}
    inputs: list[Tensor] = []
    hooks = [
        moe_block(moe, layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
        for layer in range(len(decoder_layers(moe)))
    ]
    expected = {}
    for name, ids in windows.items():
        inputs.clear()
        with torch.no_grad():
            moe(input_ids=ids)
        picks = [
            (rows @ moe_block(moe, layer).gate.weight.T).topk(2).indices.flatten().tolist()
            for layer, rows in enumerate(inputs)
        ]
        expected[name] = [[layer.count(expert) / len(layer) for expert in range(3)] for layer in picks]
    for hook in hooks:
        hook.remove()
    if plugged:
        plug_routers(moe)
    found = routing_share(moe, windows, batch=2)
    for name in windows:
        assert found.share[name].tolist() == pytest.approx(torch.tensor(expected[name]).numpy(), abs=1e-6)
    assert not any(module._forward_hooks for module in moe.modules())


@pytest.mark.parametrize("plugged", [False, True])
def test_experts_of_tokens_are_those_of_the_highest_logits(
    moe: PreTrainedModel, tokens: Callable[..., Tensor], plugged: bool
) -> None:
    if plugged:
        plug_routers(moe)
    text = tokens(1, 9, seed=5)[0]
    inputs: list[Tensor] = []
    blocks = [moe_block(moe, layer) for layer in range(len(decoder_layers(moe)))]
    hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1))) for block in blocks]
    found = experts_of_tokens(moe, text)
    for hook in hooks:
        hook.remove()
    likeliest = [(rows @ block.gate.weight.T).argmax(dim=1) for rows, block in zip(inputs, blocks, strict=True)]
    assert found.dtype == torch.int64
    assert found.T.tolist() == [layer.tolist() for layer in likeliest]
    assert len(found.unique()) > 1
    assert not any(module._forward_hooks for module in moe.modules())


def test_summary_by_hand() -> None:
    # One layer and two domains: loads (1, 0), (1/2, 1/2) → (3/4, 1/4). Two layers: the second even.
    routing = Routing(
        {
            "a": torch.tensor([[1.0, 0.0], [0.5, 0.5]]),
            "b": torch.tensor([[0.5, 0.5], [0.5, 0.5]]),
        },
        [0, 2],
    )
    summary = routing.summary()
    assert routing.load.tolist() == [[0.75, 0.25], [0.5, 0.5]]
    assert summary["load_max_over_mean"] == [1.5, 1.0]
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert summary["load_entropy"] == pytest.approx([entropy, math.log(2)])
    assert summary["share"] == {"a": [0.75, 0.25], "b": [0.5, 0.5]}
    assert summary["share_by_layer"]["a"] == [[1.0, 0.0], [0.5, 0.5]]


def test_mask_overlap_by_hand() -> None:
    # Layer 0: {0, 1}, {1, 2}, {0, 1} → 1/3, 1. Layer 1: {0, 1}, {2, 3}, {1, 2} → 0, 1/3, and 1/3 between the last two.
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    for layer, experts in enumerate([[(0, 1), (1, 2), (0, 1)], [(0, 1), (2, 3), (1, 2)]]):
        for expert, channels in enumerate(experts):
            masks[layer, expert, list(channels)] = True
    expected = [[1, 1 / 6, 2 / 3], [1 / 6, 1, 1 / 3], [2 / 3, 1 / 3, 1]]
    assert mask_overlap(masks).tolist() == pytest.approx(torch.tensor(expected).numpy())
