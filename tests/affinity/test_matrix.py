"""Masked activations against a model that is really sliced, and the matrix of cross-domain perplexities."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import dive
from dive.affinity import matrix as matrix_module
from dive.affinity.matrix import SLICING_PAYS, cross_domain_perplexity, pruned_in_place, sliced_in_place, slicing_pays
from dive.model.families import decoder_layers
from dive.pruning.statistics import ChannelStatistics

Tokens = Callable[..., Tensor]


class Sliced(nn.Module):
    """A pruned FFN with FLAP's bias, written down directly."""

    def __init__(self, mlp: Any, mask: Tensor, mean: Tensor | None) -> None:
        super().__init__()
        self.act = mlp.act_fn
        self.gate = mlp.gate_proj.weight[mask]
        self.up = mlp.up_proj.weight[mask]
        self.down = mlp.down_proj.weight[:, mask]
        self.bias = 0.0 if mean is None else mlp.down_proj.weight @ (mean.float() * ~mask)

    def forward(self, x: Tensor) -> Tensor:
        return (self.act(x @ self.gate.T) * (x @ self.up.T)) @ self.down.T + self.bias


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def perplexity_by_hand(model: PreTrainedModel, ids: Tensor) -> float:
    chosen = torch.log_softmax(logits(model, ids).double(), dim=-1)[:, :-1].gather(2, ids[:, 1:, None])
    return math.exp(-float(chosen.mean()))


def slice_for_good(model: PreTrainedModel, masks: Tensor, means: Tensor | None) -> None:
    for number, layer in enumerate(decoder_layers(model)):
        layer.mlp = Sliced(layer.mlp, masks[number], None if means is None else means[number])


@pytest.fixture
def statistics(dense: PreTrainedModel, tokens: Tokens) -> dict[str, ChannelStatistics]:
    return dive.collect_statistics(dense, {"a": tokens(4, 12, seed=1), "b": tokens(4, 12, seed=2)})


PRUNING = [pruned_in_place, sliced_in_place]


@pytest.mark.parametrize("prune", PRUNING)
@pytest.mark.parametrize("biased", [True, False])
def test_masked_activations_are_a_sliced_model(
    dense: PreTrainedModel, statistics: dict[str, ChannelStatistics], tokens: Tokens, biased: bool, prune: Any
) -> None:
    masks, means = dive.keep_masks(dense, statistics["a"], ratio=0.5), statistics["a"].mean
    ids = tokens(2, 12, seed=9)
    unpruned = logits(dense, ids)
    with prune(dense, masks, means if biased else torch.zeros_like(means)):
        found = logits(dense, ids)
    assert torch.equal(logits(dense, ids), unpruned)
    slice_for_good(dense, masks, means if biased else None)
    torch.testing.assert_close(found, logits(dense, ids), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, unpruned, atol=1e-2)


@pytest.mark.parametrize("prune", PRUNING)
def test_each_entry_is_the_perplexity_of_a_sliced_model(
    build: Callable[..., PreTrainedModel], tokens: Tokens, prune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    monkeypatch.setattr(matrix_module, "SLICING_PAYS", 1 if prune is sliced_in_place else 1000)
    monkeypatch.setattr(matrix_module, prune.__name__, lambda *arguments: used.append(prune) or prune(*arguments))
    measured = {"a": tokens(3, 10, seed=3), "b": tokens(2, 14, seed=4)}
    model = build()
    found = dive.collect_statistics(model, measured)
    masks = {name: dive.keep_masks(model, s, ratio=0.5) for name, s in found.items()}
    means = {name: s.mean for name, s in found.items()}
    for compensated in (None, means):
        matrix = cross_domain_perplexity(model, measured, masks, means=compensated, batch=2)
        assert matrix.dtype == torch.float64
        for i, pruned_on in enumerate(measured):
            sliced = build()
            slice_for_good(sliced, masks[pruned_on], compensated and compensated[pruned_on])
            for j, ids in enumerate(measured.values()):
                assert float(matrix[i, j]) == pytest.approx(perplexity_by_hand(sliced, ids), rel=1e-4)
    assert used == [prune] * 4


def test_slicing_pays_where_a_pass_has_many_tokens_or_a_mask_keeps_few() -> None:
    mask = torch.arange(48).expand(2, -1) < 24  # half is kept: as many tokens as the constant says
    assert not slicing_pays(mask, SLICING_PAYS)
    assert slicing_pays(mask, SLICING_PAYS + 1)
    assert slicing_pays(torch.arange(48).expand(2, -1) < 12, SLICING_PAYS // 3 + 1)  # three removed for each kept
    assert not slicing_pays(torch.ones(2, 48, dtype=torch.bool), 10**9)


@pytest.mark.parametrize("prune", PRUNING)
def test_no_state_is_left_behind(build: Callable[..., PreTrainedModel], tokens: Tokens, prune: Any) -> None:
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = torch.zeros(2, 48, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="midway"), prune(model, masks, torch.zeros(2, 48)):
        raise RuntimeError("midway")
    cross_domain_perplexity(model, {"a": tokens(2, 8)}, {"a": masks})
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_keeping_everything_is_the_dense_model(build: Callable[..., PreTrainedModel], tokens: Tokens) -> None:
    model, ids = build(), tokens(2, 8)
    matrix = cross_domain_perplexity(model, {"a": ids}, {"a": torch.ones(2, 48, dtype=torch.bool)})
    assert float(matrix[0, 0]) == pytest.approx(perplexity_by_hand(model, ids), rel=1e-5)
