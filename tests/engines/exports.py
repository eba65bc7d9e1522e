"""Small exports of random weights, one of each kind that engines have treated differently."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import dive
from dive.model.architecture import EMBEDDED
from tests import conftest

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,  # of the embedded tokenizer
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = conftest.LLAMA3_ROPE | {"original_max_position_embeddings": 64}


@dataclass(frozen=True, slots=True)
class Kind:
    """A dense model, and what is made of it."""

    config: Callable[..., Any]
    model: Callable[..., PreTrainedModel]
    settings: dict[str, Any]
    overrides: tuple[str, ...] = ()
    top_k: int = 1


TIED, WIDE = {"tie_word_embeddings": True}, {"head_dim": 64}  # heads of 32 would be hidden size / heads
PROBABILITIES = ("moe.gates=probabilities",)
KINDS = {
    "mixtral, tied head": Kind(LlamaConfig, LlamaForCausalLM, TIED),
    "mixtral, wide heads, Llama-3 RoPE scaling": Kind(
        LlamaConfig, LlamaForCausalLM, TIED | WIDE | {"rope_parameters": LLAMA3_ROPE}, top_k=2
    ),
    "mixtral, Llama-3 RoPE scaling": Kind(LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}, top_k=2),
    "mixtral, untied": Kind(LlamaConfig, LlamaForCausalLM, {}, top_k=2),
    "qwen3_moe, tied head, wide heads": Kind(Qwen3Config, Qwen3ForCausalLM, TIED | WIDE, top_k=2),
    "qwen3_moe, probabilities": Kind(Qwen3Config, Qwen3ForCausalLM, WIDE, PROBABILITIES, 2),
    "qwen2_moe from Qwen2": Kind(Qwen2Config, Qwen2ForCausalLM, TIED, top_k=2),
    "qwen2_moe from Qwen2, probabilities": Kind(Qwen2Config, Qwen2ForCausalLM, TIED, PROBABILITIES, 2),
    "qwen2_moe from Llama, probabilities, Llama-3 RoPE scaling": Kind(
        LlamaConfig,
        LlamaForCausalLM,
        TIED | {"rope_parameters": LLAMA3_ROPE},
        (*PROBABILITIES, "model.twin=qwen2_moe", "moe.shared_expert=0.25"),
        2,
    ),
    "qwen2_moe from Llama, probabilities, wide heads": Kind(
        LlamaConfig, LlamaForCausalLM, TIED | WIDE, (*PROBABILITIES, "model.twin=qwen2_moe"), 2
    ),
}


def make(name: str, directory: Path) -> Path:
    """Write the export of this kind: 4 experts a layer, half of the channels each."""
    kind = KINDS[name]
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    dense = kind.model(kind.config(**(SHAPE | kind.settings)))
    for parameter in dense.parameters():
        if parameter.dim() == 1:  # norms, and biases
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    tokens = {name: torch.randint(2, SHAPE["vocab_size"], (4, 64)) for name in ("a", "b")}
    torch.random.set_rng_state(state)
    dense = dense.requires_grad_(False).eval()
    overrides = [*kind.overrides, "moe.refined.rounds=0", "moe.refined.steps=0"]
    moe = dive.reconstruct(dense, tokens, overrides, ratio=0.5, experts=4, top_k=kind.top_k, width_multiple=32)
    return dive.save(moe, AutoTokenizer.from_pretrained(EMBEDDED), directory, card="---\n---\n\n# A model\n")
