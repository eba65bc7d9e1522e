"""Taylor scores against gradients of the weights, and against what removing a channel really does to the loss."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

import dive
from dive.affinity.matrix import pruned_in_place
from dive.config import Metric
from dive.errors import UserError
from dive.eval.perplexity import token_nll
from dive.model.families import ffn, ffn_projections
from dive.pruning.metrics import importance
from dive.pruning.taylor import taylor_scores

Build = Callable[..., PreTrainedModel]
Tokens = Callable[..., Tensor]


def by_weights(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(L, F): Σ over sequences and matrices of |Σ w · ∂loss/∂w|, as LLM-Pruner's code has it (vectorize, sum)."""
    total = torch.zeros(2, 48, dtype=torch.float64)
    model.requires_grad_(True)
    for row in tokens:
        model.zero_grad()
        logits = model(input_ids=row[None]).logits[0, :-1]
        functional.cross_entropy(logits, row[1:], reduction="sum").backward()
        for number in range(2):
            gate, up, down = (p.weight * p.weight.grad for p in ffn_projections(model, number))
            total[number] += (gate.sum(dim=1).abs() + up.sum(dim=1).abs() + down.sum(dim=0).abs()).double()
    model.zero_grad()
    model.requires_grad_(False)
    return total.detach()


def test_scores_are_those_of_the_weights_gradients(dense: PreTrainedModel, tokens: Tokens) -> None:
    rows = tokens(3, 12)
    found = taylor_scores(dense, {"a": rows}, batch=2)["a"]
    torch.testing.assert_close(found, by_weights(dense, rows), rtol=1e-3, atol=1e-4)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in dense.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())


def test_a_channel_that_barely_fires_scores_what_its_removal_costs(build: Build, tokens: Tokens) -> None:
    # A first-order estimate is exact where the change is small: the channel's down column is scaled down.
    model = build()
    ffn(model, 1).down[:, 7] *= 1e-3
    rows = tokens(1, 16)
    mask = torch.ones(2, 48, dtype=torch.bool)
    mask[1, 7] = False
    model.double()
    before, _ = token_nll(model, rows, batch=1)
    with pruned_in_place(model, mask, torch.zeros(2, 48)):
        after, _ = token_nll(model, rows, batch=1)
    gates_part = by_weights(model, rows)[1, 7] - 2 * abs(after - before)
    found = taylor_scores(model, {"a": rows})["a"][1, 7]
    # up's and down's terms are each the change of the loss; what is left is the gate's.
    assert float(found - gates_part) == pytest.approx(2 * abs(after - before), rel=1e-2)
    assert abs(after - before) > 1e-5


def test_scores_add_up_and_do_not_depend_on_the_batch(build: Build, tokens: Tokens) -> None:
    model = build()
    one, two = tokens(3, 8, seed=1), tokens(2, 8, seed=2)
    found = dive.collect_statistics(model, {"one": one, "two": two}, taylor=True, batch=2)
    both = dive.collect_statistics(model, {"both": torch.cat([one, two])}, taylor=True, batch=5)["both"]
    merged = found["one"] + found["two"]
    assert merged.taylor is not None
    assert both.taylor is not None
    torch.testing.assert_close(merged.taylor, both.taylor, rtol=1e-4, atol=1e-6)
    assert torch.equal(importance(Metric.taylor, ffn(model, 1), both.layer(1)), both.taylor[1])


def test_the_pruned_model_is_built_on_them(build: Build, tokens: Tokens) -> None:
    model = build()
    statistics = dive.collect_statistics(model, {"a": tokens(3, 16)}, taylor=True)["a"]
    assert statistics.taylor is not None
    masks = dive.keep_masks(model, statistics, metric="taylor", ratio=0.5)
    assert set(masks[1].nonzero().squeeze(1).tolist()) == set(statistics.taylor[1].topk(24).indices.tolist())


def test_statistics_without_scores_are_refused(build: Build, tokens: Tokens) -> None:
    model = build()
    bare = dive.collect_statistics(model, {"a": tokens(2, 8)})["a"]
    assert bare.taylor is None
    with pytest.raises(UserError, match=r"pruning\.metric=taylor needs .* taylor=True"):
        dive.keep_masks(model, bare, metric="taylor")
