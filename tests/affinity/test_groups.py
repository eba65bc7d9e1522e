"""Measures between domains where some layers stay dense."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dive.affinity.groups import MATRIX, compare_importance, compare_masks, mine
from dive.config import Metric
from dive.eval.perplexity import token_nll
from dive.pruning.calibrate import calibrate
from tests.workplace import Bench, Ready


def test_layers_that_stay_dense_are_not_looked_at(
    build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    model, run = build(), Bench(tmp_path)
    ready = Ready(model)
    text = {name: tokens(3, 16, seed=seed) for seed, name in enumerate("abc")}
    statistics = calibrate(run, 4, model=ready, tokens=text, taylor=False)
    common = {"model": ready, "statistics": statistics, "metric": Metric.wifv, "seed": 0}

    perplexities = {
        layers: torch.tensor(
            mine(run, 4, **common, measured=text, width=8, bias=False, dense_layers=list(layers)).read(MATRIX)[
                "perplexity"
            ]
        )
        for layers in ((), (0,), (1,), (0, 1))
    }
    for column, matrix in enumerate(text.values()):
        nll, count = token_nll(model, matrix, batch=4)
        for row in range(3):
            assert float(perplexities[0, 1][row, column]) == pytest.approx(
                torch.tensor(nll / count).exp().item(), rel=1e-5
            )
    found = [matrix for layers, matrix in perplexities.items()]
    assert all(not torch.allclose(found[i], found[j], rtol=1e-3) for i in range(4) for j in range(i))

    def similarity(compare: Callable[..., object], layers: list[int], **more: int) -> Tensor:
        return torch.tensor(compare(run, **common, dense_layers=layers, **more).read(MATRIX)["similarity"])  # type: ignore[attr-defined]

    for compare, more in ((compare_importance, {}), (compare_masks, {"width": 8})):
        both, first, second = (similarity(compare, layers, **more) for layers in ([], [1], [0]))
        torch.testing.assert_close(both, (first + second) / 2, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(first, second)
