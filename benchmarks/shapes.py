"""Dense models of random weights to time, made in memory."""

import argparse
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                  "num_key_value_heads": 4, "vocab_size": 32000},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152},
    "half": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
             "num_key_value_heads": 4, "vocab_size": 8000},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 320},
}  # fmt: skip
"""``half`` is half as wide as TinyLlama, and four layers deep: what a CPU core can run."""


def llama_config(shape: str) -> LlamaConfig:
    """Of one of :data:`SHAPES`."""
    return LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=False)


def random_model(settings: argparse.Namespace) -> "PreTrainedModel":
    """A frozen Llama of ``settings.shape`` on ``settings.device``, in ``settings.dtype``."""
    torch.manual_seed(settings.seed)
    with settings.device:
        model: PreTrainedModel = LlamaForCausalLM(llama_config(settings.shape)).to(settings.dtype)
    model.requires_grad_(False)
    return model.eval()


def random_domains(settings: argparse.Namespace) -> dict[str, Tensor]:
    """{domain: (samples, length) int64} of ``settings.domains`` domains."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.samples, settings.length)
    vocabulary = int(SHAPES[settings.shape]["vocab_size"])
    return {f"domain {d}": torch.randint(vocabulary, size, generator=generator) for d in range(settings.domains)}


def add_arguments(
    parser: argparse.ArgumentParser, *, domains: int, samples: int, length: int, batch: int, rounds: int
) -> None:
    """Options of the benchmarks that read domains with a dense model, with these defaults."""
    parser.add_argument("--shape", choices=SHAPES, default="half")
    parser.add_argument("--domains", type=int, default=domains)
    parser.add_argument("--samples", type=int, default=samples, help="sequences of a domain")
    parser.add_argument("--length", type=int, default=length, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=batch, help="sequences of a forward pass")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)


def describe(settings: argparse.Namespace) -> str:
    """The model and the tokens, for above a table."""
    s = SHAPES[settings.shape]
    return (
        f"{s['num_hidden_layers']} layers, D {s['hidden_size']}, F {s['intermediate_size']}, vocabulary {s['vocab_size']}, "
        f"{settings.dtype}; {settings.domains} domains × {settings.samples} × {settings.length} tokens, "
        f"{settings.batch} sequences a pass; {settings.rounds} rounds"
    )
