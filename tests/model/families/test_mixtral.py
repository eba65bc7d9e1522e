"""Llama and Mistral become Mixtral."""

import pytest
from transformers import LlamaConfig, MistralConfig, MixtralForCausalLM

from dive.model.families import count_parameters, moe_class, moe_config

# TinyLlama-1.1B's shape.
TINYLLAMA = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("dense", [TINYLLAMA, MistralConfig(sliding_window=7)])
def test_its_configuration(dense: LlamaConfig | MistralConfig) -> None:
    config = moe_config(dense, width=24, experts=4, top_k=2)
    assert moe_class(config) is MixtralForCausalLM
    assert (config.num_local_experts, config.intermediate_size, config.num_experts_per_tok) == (4, 24, 2)
    assert config.sliding_window == getattr(dense, "sliding_window", None)


def test_the_papers_parameter_counts() -> None:
    # Dense 1.100 B; 1/8: 3.385 B in all, 0.720 B active; 2/8: 1.862 B in all, 0.720 B active.
    assert count_parameters(TINYLLAMA) == (1_100_048_384, 1_100_048_384)
    for width, top_k, total, active in ((2816, 1, 3.385e9, 0.720e9), (1408, 2, 1.862e9, 0.720e9)):
        found = count_parameters(moe_config(TINYLLAMA, width=width, experts=8, top_k=top_k))
        assert found == pytest.approx((total, active), rel=2e-3)
