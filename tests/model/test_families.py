"""Configurations of the twins, parts of the freezing policy, parameter counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    GPT2Config,
    LlamaConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeForCausalLM,
)

from dive.config import PARTS
from dive.errors import UserError
from dive.model.families import (
    check_supported,
    count_parameters,
    decoder_layers,
    empty_moe,
    ffn,
    ffn_modules,
    moe_block,
    moe_class,
    moe_config,
    part_of,
)

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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "model_type 'gpt2' is not supported; choose one of llama, mistral, qwen3"),
        (LlamaConfig(attention_bias=True), "attention_bias=true has no place"),
        (LlamaConfig(mlp_bias=True), "mlp_bias=true has no place"),
    ],
)
def test_what_has_no_twin_is_refused(config: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^model.path=here: {message}"):
        check_supported(config, "here")


def test_every_family_is_supported(dense: PreTrainedModel) -> None:
    check_supported(dense.config, "here")


def test_the_twins_configuration(dense: PreTrainedModel) -> None:
    config = moe_config(dense.config, width=24, experts=4, top_k=2)
    qwen = dense.config.model_type == "qwen3"
    assert moe_class(config) is (Qwen3MoeForCausalLM if qwen else MixtralForCausalLM)
    assert (config.num_experts, config.num_experts_per_tok) == (4, 2)
    assert (config.moe_intermediate_size if qwen else config.intermediate_size) == 24
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
    ):
        assert getattr(config, name) == getattr(dense.config, name), name
    assert config.sliding_window == getattr(dense.config, "sliding_window", None)
    # Through the file and back, and into a model.
    again = AutoConfig.for_model(**config.to_dict())
    assert again.rope_parameters == dense.config.rope_parameters
    model = empty_moe(config, torch.float32)
    assert moe_block(model, 0).experts.gate_up_proj.shape == (4, 48, 32)
    attention, twin = decoder_layers(dense)[0].self_attn, decoder_layers(model)[0].self_attn
    assert {n: p.shape for n, p in attention.named_parameters()} == {n: p.shape for n, p in twin.named_parameters()}


@pytest.mark.parametrize("layers_with_full_attention", [0, 1, 2])
def test_sliding_windows_of_qwen3(
    build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor], layers_with_full_attention: int
) -> None:
    # The twin's attention must see what the dense model's sees, or the model must be refused.
    from dive.moe.reconstruct import reconstruct
    from dive.pruning.calibrate import collect_statistics

    dense = build("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=layers_with_full_attention)
    try:
        check_supported(dense.config, "here")
    except UserError as error:
        assert "sliding" in str(error)  # noqa: PT017
        return
    for layer in range(2):
        ffn(dense, layer).up[::6] = 0.0
    moe = reconstruct(dense, [collect_statistics(dense, {"a": tokens(2, 16)})["a"]], ratio=8 / 48)
    ids = tokens(2, 16, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(moe(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def test_the_ffn_by_its_weights(dense: PreTrainedModel) -> None:
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    weights = ffn(dense, 1)
    mlp, down = ffn_modules(dense, 1)
    with torch.no_grad():
        torch.testing.assert_close(weights.channels(rows) @ weights.down.T, mlp(rows))
        torch.testing.assert_close(down(weights.channels(rows)), mlp(rows))
    weights.down.zero_()  # a view, not a copy
    with torch.no_grad():
        assert not mlp(rows).any()


def test_every_parameter_has_its_part(dense: PreTrainedModel) -> None:
    model = empty_moe(moe_config(dense.config, width=24, experts=4, top_k=2), torch.float32)
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    tied = dense.config.tie_word_embeddings
    assert set(parts.values()) == set(PARTS) - ({"head"} if tied else set())
    for name, part in parts.items():
        end = name.rsplit(".", 1)[0]
        assert part == (
            "norms" if end.endswith("norm")
            else "attention" if end.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))
            else "router" if end.endswith("gate")
            else "experts" if "experts" in name
            else "head" if end == "lm_head"
            else "embeddings"
        ), name  # fmt: skip
    with pytest.raises(ValueError, match="belongs to no part"):
        part_of("model.something.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_twin(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    config = moe_config(LlamaConfig(vocab_size=50, hidden_size=16, num_attention_heads=2, num_hidden_layers=1,
                                    intermediate_size=32, num_key_value_heads=1), width=8, experts=3, top_k=1)  # fmt: skip
    model = empty_moe(config, dtype)
    assert torch.get_default_dtype() == before
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config.dtype == dtype
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not model.training


def test_the_papers_parameter_counts() -> None:
    # Dense 1.100 B; 1/8: 3.385 B in all, 0.720 B active; 2/8: 1.862 B in all, 0.720 B active.
    assert count_parameters(TINYLLAMA) == (1_100_048_384, 1_100_048_384)
    for width, top_k, total, active in ((2816, 1, 3.385e9, 0.720e9), (1408, 2, 1.862e9, 0.720e9)):
        found = count_parameters(moe_config(TINYLLAMA, width=width, experts=8, top_k=top_k))
        assert found == pytest.approx((total, active), rel=2e-3)


def test_parameters_of_a_qwen_twin_by_hand() -> None:
    dense = Qwen3Config(
        vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=2, tie_word_embeddings=True,
    )  # fmt: skip
    # Embeddings 40; attention 4·4 + 2·4·2 + 4·4 = 48, q and k norms 2 + 2; norms 4 + 4 + 4; together 104.
    assert count_parameters(dense) == (104 + 3 * 4 * 8, 104 + 3 * 4 * 8)
    # Router 3·4 = 12, an expert of width 6: 3·4·6 = 72.
    assert count_parameters(moe_config(dense, width=6, experts=3, top_k=2)) == (116 + 3 * 72, 116 + 2 * 72)
