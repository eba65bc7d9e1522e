"""Qwen3 becomes Qwen3-MoE."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3MoeForCausalLM

from dive.errors import UserError
from dive.model.architecture import read_architecture
from dive.model.families import check_supported, count_parameters, ffn, moe_class, moe_config

DENSE = Qwen3Config(
    vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=2, tie_word_embeddings=True,
)  # fmt: skip


def test_its_configuration() -> None:
    config = moe_config(DENSE, width=6, experts=3, top_k=2)
    assert moe_class(config) is Qwen3MoeForCausalLM
    assert (config.num_experts, config.moe_intermediate_size, config.num_experts_per_tok) == (3, 6, 2)
    assert config.norm_topk_prob


def test_parameters_by_hand() -> None:
    # Embeddings 40; attention 4·4 + 2·4·2 + 4·4 = 48, q and k norms 2 + 2; norms 4 + 4 + 4; together 104.
    assert count_parameters(DENSE) == (104 + 3 * 4 * 8, 104 + 3 * 4 * 8)
    # Router 3·4 = 12, an expert of width 6: 3·4·6 = 72.
    assert count_parameters(moe_config(DENSE, width=6, experts=3, top_k=2)) == (116 + 3 * 72, 116 + 2 * 72)


def test_heads_are_128_wide_where_the_file_does_not_say() -> None:
    settings = {name: value for name, value in DENSE.to_dict().items() if name != "head_dim"}
    assert read_architecture(settings).head_dim == 128
    assert read_architecture(settings | {"model_type": "llama"}).head_dim == 2


@pytest.mark.parametrize("layers_with_full_attention", [0, 1, 2])
def test_sliding_windows(
    build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor], layers_with_full_attention: int
) -> None:
    # The twin's attention must see what the dense model's sees, or the model must be refused.
    from dive.api import reconstruct
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
