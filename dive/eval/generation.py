"""What a model writes: the same beginnings continued greedily, to be read beside each other.

Shapes: N texts, P tokens of a beginning, G tokens of a continuation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_PROMPT = 64
"""Tokens of a beginning, at most."""


@dataclass(slots=True)
class Beginnings:
    """Texts to continue, and how they go on."""

    domains: list[str]
    prompts: Tensor
    """(N, P) int64"""
    references: Tensor
    """(N, G) int64, the tokens that follow."""

    @classmethod
    def of(cls, windows: Mapping[str, Tensor], domains: list[str], *, tokens: int) -> "Beginnings":
        """The first of each domain's windows (N, T): its beginning, and at most half of it to be continued."""
        length = next(iter(windows.values())).shape[1]
        tokens = min(tokens, length // 2)
        prompt = min(LONGEST_PROMPT, length - tokens)
        rows = torch.stack([windows[domain][0] for domain in domains])
        return cls(domains, rows[:, :prompt], rows[:, prompt : prompt + tokens])


@torch.no_grad()
def continue_greedily(model: "PreTrainedModel", prompts: Tensor, *, tokens: int, end: int | None) -> list[list[int]]:
    """The likeliest next token, ``tokens`` times over, for prompts (N, P) int64; shorter where ``end`` comes first."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=0 if end is None else end
    )
    ids = prompts.to(model.device)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    rows: list[list[int]] = found[:, prompts.shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
