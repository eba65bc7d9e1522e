"""Similarity of domains from their channel statistics alone: no forward pass beyond calibration.

Shapes: n domains, L layers, F channels.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from dive.eval.routing import mask_overlap


def importance_similarity(scores: Tensor) -> NDArray[np.float64]:
    """Spearman correlation of the importance of a layer's channels to two domains, averaged over layers, (n, n).

    Ranks, because which channels an expert keeps depends on their order alone, and scores are spread over decades.

    Args:
        scores: (n, L, F).
    """
    ranks = rankdata(scores.cpu().numpy(), axis=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.mean([np.corrcoef(ranks[:, layer]) for layer in range(ranks.shape[1])], axis=0)
    # A layer whose channels all score the same correlates with nothing.
    found = np.nan_to_num(np.atleast_2d(correlation), nan=0.0)
    np.fill_diagonal(found, 1.0)
    return np.asarray(found)


def overlap_similarity(masks: Tensor) -> NDArray[np.float64]:
    """Jaccard index of the channels kept for two domains, averaged over layers, (n, n).

    Args:
        masks: (n, L, F) bool.
    """
    return np.asarray(mask_overlap(masks.transpose(0, 1)).numpy())
