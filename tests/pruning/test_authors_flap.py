"""FLAP against the numbers of the authors' code, on a model whose weights follow a formula.

The authors' running variance updates the mean in place before it reads the "old" mean, so every sample is compared with
the new mean only and the first sample adds nothing. Here theirs is reproduced, and ours is pinned to the exact variance.
How far apart the two are: the authors' scores are 11 to 15 times the exact ones, because their sum of squares is
divided by the number of samples while each sample has 16 tokens; the ranking hardly changes, 24 of 24 channels kept alike
in the first layer and 23 of 24 in the second.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import dive
from dive.config import Metric
from dive.model.families import ffn
from dive.model.layers import Track
from dive.pruning.compensation import bias
from dive.pruning.metrics import importance
from dive.pruning.statistics import ChannelStatistics

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "authors_flap.json").read_text())
METRICS: dict[str, dict[str, Any]] = GOLDEN["metrics"]
LAYERS = range(2)
SAMPLES, LENGTH = 24, 16

cases = pytest.mark.parametrize(("metric", "layer"), [(m, layer) for m in METRICS for layer in LAYERS])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**GOLDEN["config"])).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        k, s = np.arange(parameter.numel(), dtype=np.float64), sum(map(ord, name))
        values = 1 + 0.1 * np.sin(0.7 * k + s) if "norm" in name else 0.25 * np.sin(12.9898 * k + 0.618 * s)
        parameter.copy_(torch.from_numpy(values).reshape(parameter.shape))
    return model


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    i = torch.arange(SAMPLES * LENGTH)
    return ((31 * i**2 + 17 * i + 7) % 97).reshape(SAMPLES, LENGTH)


@pytest.fixture(scope="module")
def statistics(model: LlamaForCausalLM, matrix: Tensor) -> ChannelStatistics:
    return dive.collect_statistics(model, {"all": matrix}, batch=5)["all"]


@pytest.fixture(scope="module")
def activations(model: LlamaForCausalLM, matrix: Tensor) -> list[np.ndarray]:
    """(samples, tokens, F) float64 of each layer."""
    track = Track(model, list(matrix.split(1)))
    layers = range(model.config.num_hidden_layers)
    return [np.stack([seen.channels.double().numpy() for seen in track.run(number)]) for number in layers]


def test_the_model_is_theirs(model: LlamaForCausalLM, matrix: Tensor) -> None:
    logits = model(input_ids=matrix[:1]).logits[0, -1]
    np.testing.assert_allclose(logits[:8], GOLDEN["dense_logits_first"], rtol=1e-4, atol=1e-5)


@cases
def test_scores_are_exact(model: LlamaForCausalLM, statistics: ChannelStatistics, metric: str, layer: int) -> None:
    scores = importance(Metric(metric.lower()), ffn(model, layer), statistics.layer(layer))
    np.testing.assert_allclose(scores, METRICS[metric]["exact_score"][layer], rtol=1e-4)


@cases
def test_kept_channels(model: LlamaForCausalLM, statistics: ChannelStatistics, metric: str, layer: int) -> None:
    masks = dive.keep_masks(model, statistics, metric=metric.lower(), ratio=GOLDEN["ratio"])
    ours = masks[layer].nonzero().flatten().tolist()
    assert ours == METRICS[metric]["exact_kept"][layer]
    theirs = METRICS[metric]["kept"][layer]
    assert len(set(ours) & set(theirs)) / len(theirs) == pytest.approx(METRICS[metric]["overlap_kept"][layer])


@cases
def test_bias_of_their_channels_is_theirs(
    model: LlamaForCausalLM, statistics: ChannelStatistics, metric: str, layer: int
) -> None:
    mask = torch.zeros(48, dtype=torch.bool)
    mask[METRICS[metric]["kept"][layer]] = True
    found = bias(ffn(model, layer).down, statistics.mean[layer], mask)
    np.testing.assert_allclose(found, METRICS[metric]["bias"][layer], rtol=1e-3, atol=2e-5)


def authors_variance(samples: np.ndarray, *, slip: bool) -> np.ndarray:
    """Running variance as the authors update it, sample (tokens, F) after sample; (F,).

    ``old_mean`` and ``mean`` are meant to be the means before and after a sample; by the slip both are the one after.
    """
    mean = np.zeros(samples.shape[-1])
    variance = np.zeros_like(mean)
    for seen, sample in enumerate(samples):
        old_mean = mean
        mean = mean * seen / (seen + 1) + sample.mean(axis=0) / (seen + 1)
        if slip:
            old_mean = mean
        if seen > 0:
            squares = ((sample - mean) * (sample - old_mean)).sum(axis=0)
            variance = variance * (seen - 1) / seen + squares / (seen + 1)
    return variance


@cases
def test_the_slip_explains_the_scores_of_their_code(
    model: LlamaForCausalLM, activations: list[np.ndarray], metric: str, layer: int
) -> None:
    samples, down = activations[layer], ffn(model, layer).down.double().numpy()
    if metric == "WIFN":  # mean squares have no slip, but are divided by samples as well
        found = np.abs(down).mean(axis=0) * np.sqrt((samples**2).sum(axis=(0, 1)) / SAMPLES)
    else:
        found = authors_variance(samples, slip=True) * ((down**2).sum(axis=0) if metric == "WIFV" else 1.0)
    np.testing.assert_allclose(found, METRICS[metric]["score_of_authors_code"][layer], rtol=1e-4)
    assert sorted(np.argsort(-found)[: len(found) // 2].tolist()) == METRICS[metric]["kept"][layer]


@pytest.mark.parametrize("layer", LAYERS)
def test_how_far_the_slip_is_from_the_exact_variance(activations: list[np.ndarray], layer: int) -> None:
    samples = activations[layer]
    exact = samples.reshape(-1, samples.shape[-1]).var(axis=0, ddof=1)
    share = authors_variance(samples, slip=True) / LENGTH / exact
    assert 0.70 < share.min() < share.max() < 0.96
    # Without it the old mean lies further from the sample, and the variance is larger.
    assert (authors_variance(samples, slip=False) > authors_variance(samples, slip=True)).all()
