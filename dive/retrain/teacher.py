"""What a retrained model learns from the dense one.

Shapes: B sequences, T tokens, V vocabulary, D hidden width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def logit_distance(student: Tensor, teacher: Tensor, *, temperature: float, top_k: int | None) -> Tensor:
    """Mean over tokens of T² · KL(teacher ‖ student), in nats (Hinton et al., arXiv 1503.02531).

    Args:
        student: logits (N, V).
        teacher: logits (N, V).
        temperature: T, of both softmaxes; T² keeps the gradients' size.
        top_k: compare the teacher's k likeliest tokens and the sum of all others; every token if none.
    """
    wanted = torch.log_softmax(teacher.float() / temperature, dim=-1)
    found = torch.log_softmax(student.float() / temperature, dim=-1)
    if top_k is not None and top_k < wanted.shape[-1]:
        wanted, tokens = wanted.topk(top_k, dim=-1)
        found = found.gather(-1, tokens)
        wanted, found = _with_rest(wanted), _with_rest(found)
    distance = functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
    return distance * temperature**2


def _with_rest(log_probabilities: Tensor) -> Tensor:
    """Append the logarithm of what the given probabilities (N, k) leave."""
    rest = (1.0 - log_probabilities.exp().sum(dim=-1, keepdim=True)).clamp_min(1e-8).log()
    return torch.cat([log_probabilities, rest], dim=-1)


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ‖h − h*‖² / Σ‖h*‖² of each sequence, averaged over sequences and layers.

    A ratio of each sequence: one of sums over a batch would depend on how an optimiser step is cut into passes.

    Args:
        student: hidden states (B, T, D) after each layer.
        teacher: the same of the dense model.
    """
    shares = [
        ((ours.float() - theirs.float()).square().sum(dim=(1, 2)) / theirs.float().square().sum(dim=(1, 2))).mean()
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(shares).mean()


def share_frozen(dense: "PreTrainedModel", model: "PreTrainedModel") -> int:
    """Let the model use the dense one's tensors wherever both have the same and it is not trained; bytes saved.

    Attention, embeddings and head are as a rule frozen, so that a teacher costs its FFNs and norms alone.
    """
    theirs = dict(dense.named_parameters(remove_duplicate=False))
    saved = 0
    for name, parameter in model.named_parameters():
        other = theirs.get(name)
        if other is None or parameter.requires_grad:
            continue
        if other.shape == parameter.shape and other.dtype == parameter.dtype and other.device == parameter.device:
            parameter.data = other.data
            saved += parameter.numel() * parameter.element_size()
    return saved
