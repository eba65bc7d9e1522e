"""Channel statistics against numpy in float64."""

from collections.abc import Callable
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dive
from dive.errors import UserError
from dive.model.families import ffn_modules
from dive.pruning.calibrate import Calibration
from dive.pruning.statistics import ChannelStatistics, batch_statistics, gram, sampled_rows, stack_layers

Tokens = Callable[..., Tensor]


def recorded(model: PreTrainedModel, matrix: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(FFN inputs, channels) of all layers by plain hooks and one forward pass: (L, T, D) and (L, T, F) float64."""
    inputs, channels, hooks = [], [], []
    for layer in range(model.config.num_hidden_layers):
        for module, into in zip(ffn_modules(model, layer), (inputs, channels), strict=True):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, into=into: into.append(args[0].flatten(0, 1).double().numpy())
                )
            )
    with torch.no_grad():
        model(input_ids=matrix)
    for hook in hooks:
        hook.remove()
    return np.stack(inputs), np.stack(channels)


def assert_same(ours: ChannelStatistics, reference: np.ndarray) -> None:
    assert ours.count == reference.shape[1]
    np.testing.assert_allclose(ours.mean, reference.mean(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.variance, reference.var(axis=1, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(ours.mean_square, (reference**2).mean(axis=1), rtol=1e-5)


def test_hand_worked() -> None:
    # Channel 0: 1, 3, 8 has mean 4 and squared deviations 9 + 1 + 16 = 26; channel 1 is constant.
    found = batch_statistics(torch.tensor([[1.0, 2.0], [3.0, 2.0], [8.0, 2.0]]), second_moment=True, inputs=None)
    assert found.count == 3
    assert found.mean.tolist() == [[4.0, 2.0]]
    assert found.squared_deviations[0].tolist() == pytest.approx([26.0, 0.0], rel=1e-6)
    assert found.variance[0].tolist() == pytest.approx([13.0, 0.0], rel=1e-6)
    assert found.mean_square[0].tolist() == pytest.approx([(1 + 9 + 64) / 3, 4.0], rel=1e-6)
    assert found.second_moment is not None
    assert found.second_moment.tolist() == [[[74.0, 24.0], [24.0, 12.0]]]


def test_every_family_against_numpy(dense: PreTrainedModel, tokens: Tokens) -> None:
    matrix = tokens(5, 12)
    found = dive.collect_statistics(dense, {"a": matrix}, batch=2)["a"]
    inputs, channels = recorded(dense, matrix)
    assert_same(found, channels)
    assert found.second_moment is not None
    assert found.inputs is not None
    expected = np.einsum("ltf,ltg->lfg", channels, channels)
    np.testing.assert_allclose(found.second_moment, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(found.inputs, inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_any_batch_size_gives_the_same(build: Callable[..., PreTrainedModel], tokens: Tokens, batch: int) -> None:
    matrix = tokens(7, 10)
    model = build()
    found = dive.collect_statistics(model, {"a": matrix}, batch=batch, inputs=10, seed=5)["a"]
    inputs, channels = recorded(model, matrix)
    assert_same(found, channels)
    assert found.inputs is not None
    rows = sampled_rows(70, 10, seed=5).sort().values
    np.testing.assert_allclose(found.inputs, inputs[:, rows], rtol=1e-4, atol=1e-5)


def test_tokens_for_routers_are_from_all_positions(build: Callable[..., PreTrainedModel]) -> None:
    # As many tokens as there are sequences: one a sequence at an even distance would be the first of each.
    samples, length = 64, 16
    matrix = torch.arange(length).repeat(samples, 1)
    model = build()
    for layer in model.model.layers:  # an FFN input then tells its token, and so its position
        layer.self_attn.o_proj.weight.zero_()
    positions = model.model.layers[0].post_attention_layernorm(model.get_input_embeddings().weight[:length])
    counts = []
    for seed in (0, 0, 1):
        statistics = dive.collect_statistics(model, {"a": matrix, "b": matrix}, batch=8, inputs=samples, seed=seed)
        for found in statistics.values():
            assert found.inputs is not None
            assert found.inputs.shape[1] == samples
            distances = torch.cdist(found.inputs[0], positions)
            assert distances.min(dim=1).values.max() < 1e-2  # others are 5 apart and more
            counts.append(torch.bincount(distances.argmin(dim=1), minlength=length).tolist())
    assert all(sum(count > 0 for count in found) >= 12 and max(found) <= 16 for found in counts)
    first, first_b, again, again_b, other, _ = counts
    assert (first, first_b) == (again, again_b)
    assert first != other
    assert first != first_b


def test_merged_domains_are_one_pass_over_all_their_tokens(
    build: Callable[..., PreTrainedModel], tokens: Tokens
) -> None:
    model = build()
    domains = {"a": tokens(3, 8, seed=1), "b": tokens(5, 8, seed=2), "c": tokens(2, 8, seed=3)}
    apart = dive.collect_statistics(model, domains, batch=2)
    together = dive.collect_statistics(model, {"all": torch.cat(list(domains.values()))}, batch=4)["all"]
    merged = sum(apart.values())
    assert isinstance(merged, ChannelStatistics)
    assert merged.count == together.count == 80
    for name in ("mean", "squared_deviations", "second_moment"):
        torch.testing.assert_close(getattr(merged, name), getattr(together, name), rtol=1e-4, atol=1e-4)
    assert_same(merged, recorded(model, torch.cat(list(domains.values())))[1])


def test_merging_does_not_cancel_when_the_mean_dwarfs_the_spread() -> None:
    # E[x²] − E[x]² in float32 would lose every digit here: 1000² has 7 digits, the variance is about 0.01.
    values = 1000 + 0.1 * torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    parts = [batch_statistics(p, second_moment=False, inputs=None) for p in values.split(171)]
    expected = values.double().numpy().var(axis=0, ddof=1)
    np.testing.assert_allclose(reduce(add, parts).variance[0], expected, rtol=1e-3)


def test_layers_are_taken_apart_and_stacked_again(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    model = build()
    matrix = {"a": tokens(3, 8)}
    whole = dive.collect_statistics(model, matrix)["a"]
    again = stack_layers([whole.layer(0), whole.layer(1)])
    calibration = Calibration(model, matrix, second_moments=True, inputs=2048)
    streamed = [calibration.layer(number)[0] for number in range(2)]
    for layers in (again, stack_layers(streamed)):
        assert layers.count == whole.count
        for name in ("mean", "squared_deviations", "second_moment", "inputs"):
            assert torch.equal(getattr(layers, name), getattr(whole, name))


def test_a_single_token_has_no_variance(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    found = dive.collect_statistics(build(), {"a": tokens(1, 1)})["a"]
    assert torch.equal(found.variance, torch.zeros_like(found.variance))


def test_what_was_not_asked_for_is_not_kept(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    found = dive.collect_statistics(build(), {"a": tokens(2, 8)}, second_moments=False, inputs=0)["a"]
    assert found.second_moment is None
    assert found.inputs is None
    with_all = dive.collect_statistics(build(), {"a": tokens(2, 8)})["a"]
    assert (found + with_all).second_moment is None
    assert (found + with_all).inputs is None


@pytest.mark.parametrize("width", [1, 7, 8, 19, 64])
def test_a_gram_matrix_is_that_of_all_its_strips(width: int) -> None:
    rows = torch.randn(30, width, generator=torch.Generator().manual_seed(width))
    torch.testing.assert_close(gram(rows), rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_adding_anything_else_is_refused() -> None:
    with pytest.raises(TypeError):
        1 + batch_statistics(torch.ones(2, 2), second_moment=False, inputs=None)  # type: ignore[operator]


@pytest.mark.parametrize(
    "matrix",
    [torch.zeros(0, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), torch.zeros(2, 4)],
    ids=["empty", "a vector", "floating point"],
)
def test_tokens_of_another_shape_are_refused(build: Callable[..., PreTrainedModel], matrix: Tensor) -> None:
    with pytest.raises(UserError, match="tokens of 'law' must be a non-empty"):
        dive.collect_statistics(build(), {"law": matrix})
