"""Greedy continuations, against the logits themselves."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dive.eval.generation import Beginnings, continue_greedily


def test_the_likeliest_token_each_time(dense: PreTrainedModel, tokens: Callable[..., Tensor]) -> None:
    prompts = tokens(3, 7)
    expected = prompts
    for _ in range(5):
        following = dense(input_ids=expected, use_cache=False).logits[:, -1].argmax(dim=-1)
        expected = torch.cat([expected, following[:, None]], dim=1)
    found = continue_greedily(dense, prompts, tokens=5, end=None)
    assert found == expected[:, 7:].tolist()
    end = found[0][2]
    short = continue_greedily(dense, prompts, tokens=5, end=end)
    assert short == [row[: row.index(end)] if end in row else row for row in found]


def test_beginnings_leave_half_a_window_at_least() -> None:
    windows = {"a": torch.arange(40).reshape(2, 20), "b": torch.arange(40, 60).reshape(1, 20)}
    found = Beginnings.of(windows, ["b", "a"], tokens=32)
    assert found.prompts.tolist() == [list(range(40, 50)), list(range(10))]
    assert found.references.tolist() == [list(range(50, 60)), list(range(10, 20))]
    long = {"a": torch.arange(200).reshape(1, 200)}
    assert Beginnings.of(long, ["a"], tokens=3).prompts.shape == (1, 64)
