"""Walking the layers is the model's own forward pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dive.model.families import ffn, ffn_modules
from dive.model.layers import Track

Tokens = Callable[..., Tensor]


def recorded(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(FFN inputs, channels) of every layer by hooks on one plain forward pass."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        for layer in range(model.config.num_hidden_layers)
        for module in ffn_modules(model, layer)
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return list(zip(seen[::2], seen[1::2], strict=True))


def test_it_is_the_models_forward_pass(dense: PreTrainedModel, tokens: Tokens) -> None:
    batches = [tokens(2, 12, seed=1), tokens(3, 7, seed=2), tokens(1, 12, seed=3)]  # lengths differ
    expected = [recorded(dense, batch) for batch in batches]
    track = Track(dense, batches)
    for number in range(2):
        for seen in track.run(number):
            inputs, channels = expected[seen.index][number]
            torch.testing.assert_close(seen.inputs, inputs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(seen.channels, channels, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ffn(dense, number).channels(inputs), channels, rtol=1e-4, atol=1e-4)


def test_no_hooks_are_left_behind(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    model = build()
    list(Track(model, [tokens(1, 6)]).run(0))
    with pytest.raises(IndexError):
        Track(model, [tokens(1, 6), torch.full((1, 6), 10**6)])  # beyond the vocabulary
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(input_ids=tokens(1, 6))


def test_a_track_with_the_models_own_ffns_is_its_forward_pass(dense: PreTrainedModel, tokens: Tokens) -> None:
    batches = [tokens(2, 12, seed=1), tokens(3, 7, seed=2)]
    expected = [recorded(dense, batch) for batch in batches]
    track = Track(dense, batches)
    for number in range(2):
        inputs = list(track.attend(number))
        weights = ffn(dense, number)
        for found, layers in zip(inputs, expected, strict=True):
            torch.testing.assert_close(found, layers[number][0], rtol=1e-4, atol=1e-5)
        track.add(torch.cat([weights.channels(rows) @ weights.down.T for rows in inputs]))
    assert track.states().shape == (2 * 12 + 3 * 7, 32)
    with torch.no_grad():
        logits = dense.lm_head(dense.model.norm(track.states()))
        torch.testing.assert_close(
            logits, torch.cat([dense(input_ids=b).logits.flatten(0, 1) for b in batches]), rtol=1e-3, atol=1e-3
        )


def test_a_track_gives_the_model_its_ffns_back(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    model = build()
    before = model(input_ids=tokens(1, 6)).logits
    track = Track(model, [tokens(1, 6)])
    next(track.attend(0)).sum()  # left half-way
    del track
    assert torch.equal(model(input_ids=tokens(1, 6)).logits, before)
