"""What a model writes: the same beginnings continued greedily, to be read beside each other; or one text, as it comes.

Shapes: N texts, P tokens of a beginning, G tokens of a continuation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dive.errors import UserError
from dive.model.chat import Conversation
from dive.model.load import document_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


@torch.no_grad()
def continue_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> str:
    """Print the prompt and its continuation as the tokens come.

    The prompt is cut into tokens like every document in training and evaluation: begun by the boundary token. Of a
    conversation what is spoken is printed, and the answer, which ends where the model's generation_config says.

    Args:
        temperature: of the sampling; 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: of the sampling.

    Returns:
        The continuation.

    Raises:
        UserError: the prompt has no token, or the whole would be longer than the model's positions.
    """
    from transformers import TextStreamer

    ids = document_tokens(tokenizer, prompt)
    positions = int(model.config.max_position_embeddings)
    if not ids:
        raise UserError("prompt is empty, and this tokenizer has no token to begin a text with; set prompt=TEXT")
    if len(ids) + max_new_tokens > positions:
        raise UserError(
            f"max_new_tokens ({max_new_tokens}) and the prompt's {len(ids)} tokens exceed the model's {positions} positions; "
            "lower max_new_tokens or shorten the prompt"
        )
    if chats := isinstance(prompt, Conversation):
        print(*prompt.spoken, sep="\n")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    torch.manual_seed(seed)
    batch = torch.tensor([ids], device=model.device)
    found = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=chats, skip_special_tokens=True),
        **({"do_sample": False} | sampling),
    )
    text: str = tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)
    return text
