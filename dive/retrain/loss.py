"""The loss of the next tokens, of a few rows of logits at a time: over a large vocabulary they are most of what training holds.

Shapes: B sequences, T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dive.config import TeacherConfig
from dive.retrain.teacher import logit_distance

CHUNK = 2**20
"""Logits whose softmaxes are alive at a time."""


def next_token_loss(
    logits: Tensor, ids: Tensor, teacher: Tensor | None, settings: TeacherConfig
) -> tuple[Tensor, Tensor]:
    """(loss, the text's part of it), nats a token: (1 − a) · cross-entropy + a · distance to the teacher, a = settings.logits.

    The gradient is taken on the way and written over the logits (as in Liger Kernel, arXiv 2410.10989), so that nothing else of
    their size is made. Nobody may read them afterwards, and what made them must not need them for its own backward pass.

    Args:
        logits: (B, T, V), of a linear layer.
        ids: (B, T) int64.
        teacher: the dense model's logits (B, T, V), or none where the text alone counts.
    """
    loss, text = _NextTokens.apply(logits, ids, teacher, settings)
    return loss, text


class _NextTokens(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, teacher: Tensor | None, settings: TeacherConfig
    ) -> tuple[Tensor, Tensor]:
        count, rows = ids[:, 1:].numel(), max(CHUNK // logits.shape[-1], 1)
        loss, text = torch.zeros(2, device=logits.device).unbind()
        of_logits = logits.detach()
        for sequence, wanted in enumerate(ids[:, 1:]):
            for start in range(0, len(wanted), rows):
                part = slice(start, min(start + rows, len(wanted)))
                found = of_logits[sequence, part].detach().requires_grad_()
                with torch.enable_grad():
                    of_text = functional.cross_entropy(found.float(), wanted[part], reduction="sum")
                    of_both = of_text
                    if teacher is not None:
                        distance = logit_distance(
                            found, teacher[sequence, part], temperature=settings.temperature, top_k=settings.top_k
                        )
                        of_both = (1.0 - settings.logits) * of_text + settings.logits * distance * len(found)
                if ctx.needs_input_grad[0]:
                    (of_logits[sequence, part],) = torch.autograd.grad(of_both, found)
                loss, text = loss + of_both.detach(), text + of_text.detach()
        if ctx.needs_input_grad[0]:
            of_logits[:, -1] = 0.0
            ctx.save_for_backward(of_logits)
        ctx.count, text = count, text / count
        ctx.mark_non_differentiable(text)
        return loss / count, text

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        (of_logits,) = ctx.saved_tensors
        of_logits.mul_(gradient / ctx.count)  # before it is scaled, float16 would take what is divided for nothing
        return of_logits, None, None, None
