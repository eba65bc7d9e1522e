"""Similarity of domains from statistics, worked out by hand and against scipy."""

import numpy as np
import torch
from scipy.stats import spearmanr

from dive.affinity.similarity import importance_similarity, overlap_similarity


def test_importance_similarity_by_hand() -> None:
    # One domain ranks the channels 1 2 3, one 10 20 900 (the same order), one the other way round.
    scores = torch.tensor([[[1.0, 2.0, 3.0]], [[10.0, 20.0, 900.0]], [[5.0, 1.0, 0.0]]])
    np.testing.assert_allclose(importance_similarity(scores), [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-12)


def test_importance_similarity_is_the_mean_of_the_layers_rank_correlations() -> None:
    scores = torch.rand(4, 3, 20, generator=torch.Generator().manual_seed(0)).exp()
    found = importance_similarity(scores)
    expected = np.mean([spearmanr(scores[:, layer].numpy(), axis=1).statistic for layer in range(3)], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_scores_that_are_all_alike_correlate_with_nothing() -> None:
    scores = torch.stack([torch.ones(1, 4), torch.arange(4.0)[None]])
    assert importance_similarity(scores).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert importance_similarity(scores[1:]).tolist() == [[1.0]]


def test_overlap_similarity_by_hand() -> None:
    # Layer 1: {0, 1} and {1, 2} share one of three; layer 2: the same two channels.
    masks = torch.tensor([[[1, 1, 0], [1, 0, 1]], [[0, 1, 1], [1, 0, 1]]], dtype=torch.bool)
    np.testing.assert_allclose(overlap_similarity(masks), [[1, 2 / 3], [2 / 3, 1]])
