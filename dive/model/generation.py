"""Letting a model continue a text, token by token."""

from typing import TYPE_CHECKING

import torch
from transformers import TextStreamer

from dive.errors import UserError
from dive.model.load import document_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    The prompt is cut into tokens like every document in training and evaluation: begun by the boundary token.

    Args:
        temperature: of the sampling; 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: of the sampling.

    Returns:
        The continuation.

    Raises:
        UserError: the prompt has no token, or the whole would be longer than the model's positions.
    """
    ids = document_tokens(tokenizer, prompt)
    positions = int(model.config.max_position_embeddings)
    if not ids:
        raise UserError("prompt is empty, and this tokenizer has no token to begin a text with; set prompt=TEXT")
    if len(ids) + max_new_tokens > positions:
        raise UserError(
            f"max_new_tokens ({max_new_tokens}) and the prompt's {len(ids)} tokens exceed the model's {positions} positions; "
            "lower max_new_tokens or shorten the prompt"
        )
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    torch.manual_seed(seed)
    batch = torch.tensor([ids], device=model.device)
    found = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **({"do_sample": False} | sampling),
    )
    text: str = tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)
    return text
