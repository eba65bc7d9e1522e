"""The loss of the next tokens against the plain one, and what it holds."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dive.config import TeacherConfig
from dive.retrain import loss as module
from dive.retrain.loss import next_token_loss
from dive.retrain.teacher import logit_distance

B, T, V, D = 3, 9, 50, 8


def inputs(seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """(head, hidden states (B, T, D), ids (B, T), teacher's logits (B, T, V))."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(D, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=generator))
    hidden = torch.randn(B, T, D, generator=generator).requires_grad_()
    return (
        head,
        hidden,
        torch.randint(V, (B, T), generator=generator),
        2 * torch.randn(B, T, V, generator=generator),
    )


@pytest.mark.parametrize("chunk", [1, 3 * V, 10**6])  # a row, three of eight, all at a time
@pytest.mark.parametrize(
    "settings",
    [TeacherConfig(), TeacherConfig(logits=0.5), TeacherConfig(logits=0.3, temperature=2.0, top_k=7)],
    ids=["text", "teacher", "soft, top-k"],
)
def test_values_and_gradients_are_those_of_the_plain_loss(
    chunk: int, settings: TeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    head, hidden, ids, teacher = inputs()
    logits = head(hidden)[:, :-1].flatten(0, 1)
    text = functional.cross_entropy(logits, ids[:, 1:].flatten())
    distance = logit_distance(
        logits, teacher[:, :-1].flatten(0, 1), temperature=settings.temperature, top_k=settings.top_k
    )
    plain = (1.0 - settings.logits) * text + settings.logits * distance
    wanted = torch.autograd.grad(5.0 * plain + hidden.sum(), [hidden, head.weight])

    found, of_text = next_token_loss(head(hidden), ids, teacher if settings.logits else None, settings)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(of_text, text)
    assert not of_text.requires_grad
    torch.testing.assert_close(torch.autograd.grad(5.0 * found + hidden.sum(), [hidden, head.weight]), wanted)


def test_gradients_of_half_precision_do_not_vanish() -> None:
    """As under mixed precision with float16, whose loss is scaled against just that."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4097, 16, generator=generator).half().requires_grad_()
    ids = torch.randint(16, (1, 4097), generator=generator)
    wanted = logits.detach().float().requires_grad_()
    (65536 * functional.cross_entropy(wanted[0, :-1], ids[0, 1:])).backward()
    (65536 * next_token_loss(logits * 1, ids, None, TeacherConfig())[0]).backward()
    assert logits.grad is not None
    assert wanted.grad is not None
    torch.testing.assert_close(logits.grad.float(), wanted.grad, rtol=2e-3, atol=1e-4)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_nothing_of_the_logits_size_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2 * V)
    head, hidden, ids, teacher = inputs()
    logits = head(hidden)
    with Largest() as largest:
        loss, _ = next_token_loss(logits, ids, teacher, TeacherConfig(logits=0.5))
        torch.autograd.grad(loss, logits)
    assert largest.numbers == 2 * V < logits.numel()
