"""Routing shares and overlap, by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dive.api import reconstruct
from dive.eval import routing as routing_module
from dive.eval.measure import FOLLOWED, follow
from dive.eval.routing import Routing, experts_of_tokens, mask_overlap, routing_share, top_tokens
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


def test_a_token_that_is_met_often_enough_is_counted_for_each_expert_it_goes_to(
    moe: PreTrainedModel, tokens: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Windows of one token each: all its places see the same but for their number, which the first one has not.
    windows = {"a": torch.tensor([[7], [7], [7], [9]]), "b": torch.tensor([[7], [8], [8]])}
    monkeypatch.setattr(routing_module, "RARE", 1)
    counts = routing_share(moe, windows, batch=2).counts
    assert counts is not None
    layers = len(decoder_layers(moe))
    assert counts.shape == (moe.config.vocab_size, 3)
    assert counts.sum(dim=1).nonzero().flatten().tolist() == [7, 8]  # 9 was met once
    assert counts[[7, 8]].sum(dim=1).tolist() == [4 * layers * 2, 2 * layers * 2]  # two experts a token
    expected = torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        inputs: list[Tensor] = []
        blocks = [moe_block(moe, layer) for layer in range(layers)]
        hooks = [b.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1))) for b in blocks]
        moe(input_ids=torch.tensor([[8]]))
        for hook in hooks:
            hook.remove()
        for row, block in zip(inputs, blocks, strict=True):
            expected[(row @ block.gate.weight.T).topk(2).indices.flatten()] += 2  # it was met twice
    assert counts[8].tolist() == expected.tolist()


def test_top_tokens_by_hand() -> None:
    # Expert 0 has 24 of 40 assignments. Token 0 is all its own: lift 1 / 0.6, 12 · log(1/0.6) = 6.1. Token 1: 6 of 8, lift
    # 1.25, 6 · log 1.25 = 1.3. Token 2 goes to both as every token does; token 3 was never met; token 4 is expert 1's.
    counts = torch.tensor([[12, 0], [6, 2], [6, 4], [0, 0], [0, 10]])
    first, second = top_tokens(counts)
    assert [token["id"] for token in first] == [0, 1]
    assert [token["share"] for token in first] == [1.0, 0.75]
    assert [token["lift"] for token in first] == pytest.approx([1 / 0.6, 1.25])
    assert [token["id"] for token in second] == [4]
    assert [len(found) for found in top_tokens(counts, limit=1)] == [1, 1]


def test_texts_are_followed_layer_by_layer(moe: PreTrainedModel, tokens: Callable[..., Tensor]) -> None:
    windows = {"a": tokens(2, FOLLOWED + 3, seed=4), "b": tokens(1, 5, seed=6)}
    found = follow(moe, windows)
    assert found is not None
    assert [text["domain"] for text in found] == ["a", "b"]
    assert found[0]["ids"] == windows["a"][0, :FOLLOWED].tolist()
    assert [len(text["ids"]) for text in found] == [FOLLOWED, 5]  # type: ignore[arg-type]
    lines = experts_of_tokens(moe, windows["b"][0]).T.tolist()
    assert found[1]["experts"] == [" ".join(map(str, line)) for line in lines]


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
    assert summary["tokens"] is None


def test_mask_overlap_by_hand() -> None:
    # Layer 0: {0, 1}, {1, 2}, {0, 1} → 1/3, 1. Layer 1: {0, 1}, {2, 3}, {1, 2} → 0, 1/3, and 1/3 between the last two.
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    for layer, experts in enumerate([[(0, 1), (1, 2), (0, 1)], [(0, 1), (2, 3), (1, 2)]]):
        for expert, channels in enumerate(experts):
            masks[layer, expert, list(channels)] = True
    expected = [[1, 1 / 6, 2 / 3], [1 / 6, 1, 1 / 3], [2 / 3, 1 / 3, 1]]
    assert mask_overlap(masks).tolist() == pytest.approx(torch.tensor(expected).numpy())
