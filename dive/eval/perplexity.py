"""Token perplexity by one definition everywhere.

exp of the mean negative log-likelihood of every token but the first in non-overlapping windows of the test documents,
each document begun by the tokenizer's boundary token.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from dive.ranks import batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def token_nll(model: "PreTrainedModel", windows: Tensor, *, batch: int) -> tuple[float, int]:
    """(sum of negative log-likelihoods in nats, number of predicted tokens) over windows (N, T) int64."""
    total, count = 0.0, 0
    for rows in batches(windows, batch):
        ids = rows.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        # A window at a time: the softmax of a large vocabulary is as large again as the logits.
        for found, wanted in zip(logits[:, :-1], ids[:, 1:], strict=True):
            total += float(functional.cross_entropy(found.float(), wanted, reduction="sum"))
            count += len(wanted)
    return total, count


def perplexity(model: "PreTrainedModel", windows: Tensor, *, batch: int = 16) -> float:
    """Token perplexity over windows (N, T) int64."""
    return perplexity_of(*token_nll(model, windows, batch=batch))


def perplexity_of(nll: float, count: float) -> float:
    """Of a sum of negative log-likelihoods in nats over so many tokens; finite unless that is not a number."""
    return math.exp(min(nll / count, 700.0))


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(sum(math.log(value) for value in values) / len(values))
