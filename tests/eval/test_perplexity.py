"""Perplexity by hand."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dive.eval.perplexity import geometric_mean, perplexity, token_nll


class Bigram(nn.Module):
    """Next-token probabilities of a table: after 0 come 0, 1, 2 with 1/2, 1/4, 1/4; after 1 always 2; after 2 each alike."""

    device = torch.device("cpu")
    table = torch.tensor([[0.5, 0.25, 0.25], [1e-9, 1e-9, 1.0], [1 / 3, 1 / 3, 1 / 3]]).log()

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_by_hand() -> None:
    # 0→1: 1/4, 1→2: 1, 2→0: 1/3 and 0→0: 1/2, 0→0: 1/2, 0→2: 1/4; the first token of a window is not predicted.
    windows = torch.tensor([[0, 1, 2, 0], [0, 0, 0, 2]])
    nll, count = token_nll(Bigram(), windows, batch=16)  # type: ignore[arg-type]
    assert count == 6
    assert nll == pytest.approx(math.log(4 * 1 * 3 * 2 * 2 * 4), rel=1e-6)
    assert perplexity(Bigram(), windows) == pytest.approx(192 ** (1 / 6), rel=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_batches_make_no_difference_and_it_is_transformers_loss(
    build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor], batch: int
) -> None:
    model, windows = build(), tokens(5, 12)
    with torch.no_grad():
        loss = float(model(input_ids=windows, labels=windows).loss)
    assert perplexity(model, windows, batch=batch) == pytest.approx(math.exp(loss), rel=1e-5)


def test_hopeless_models_do_not_overflow() -> None:
    class Wrong(Bigram):
        table = torch.tensor([[0.0, -1e4], [-1e4, 0.0]])

    assert math.isfinite(perplexity(Wrong(), torch.tensor([[0, 1, 0, 1]])))  # type: ignore[arg-type]


@pytest.mark.parametrize(("values", "mean"), [([2.0, 8.0], 4.0), ([5.0], 5.0), ([1.0, 10.0, 100.0], 10.0)])
def test_geometric_mean(values: list[float], mean: float) -> None:
    assert geometric_mean(values) == pytest.approx(mean)
