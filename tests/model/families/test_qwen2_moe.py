"""Llama, Mistral without sliding windows and Qwen2 become Qwen2-MoE."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeForCausalLM,
    Qwen3Config,
)

from dive.cli import composed
from dive.config import Gates
from dive.errors import UserError
from dive.export import save
from dive.model.families import check_chosen, count_parameters, ffn, form_of, moe_block, moe_class, moe_config, twin_of
from dive.model.families.twin import Form
from dive.moe.assemble import assemble
from dive.moe.layer import ExpertLayer
from tests.model.families.checks import check_twin

Build = Callable[..., PreTrainedModel]
CHOSEN = "model.twin=qwen2_moe"
FORM = Form(twin="qwen2_moe")
DENSE = LlamaConfig(
    vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=True,
)  # fmt: skip


def test_its_configuration() -> None:
    config = moe_config(DENSE, width=6, experts=3, top_k=2, form=FORM)
    assert moe_class(config) is Qwen2MoeForCausalLM
    assert (config.num_experts, config.moe_intermediate_size, config.num_experts_per_tok) == (3, 6, 2)
    assert config.norm_topk_prob
    assert config.qkv_bias
    assert config.mlp_only_layers == []


def test_parameters_by_hand() -> None:
    # Embeddings 40; attention 4·4 + 2·4·2 + 4·4 = 48, biases 4 + 2 + 2 = 8; norms 4 + 4 + 4; together 108.
    # Router 3·4 = 12; the shared expert of 8 channels 3·4·8 = 96 and its gate 4; an expert of width 6: 3·4·6 = 72.
    always = 108 + 12 + 96 + 4
    found = count_parameters(moe_config(DENSE, width=6, experts=3, top_k=2, form=FORM))
    assert found == (always + 3 * 72, always + 2 * 72)


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "mistral"])
def test_from_the_dense_model_to_the_export(
    build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, variant: str
) -> None:
    dense = build(variant, sliding_window=None) if variant == "mistral" else build(variant)
    assert isinstance(check_twin(dense, tokenizer, tmp_path, (CHOSEN,)), Qwen2MoeForCausalLM)


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_one_whole_expert_is_the_dense_model(
    build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, variant: str
) -> None:
    dense = build(variant)
    layers = []
    for number in range(2):
        weights = ffn(dense, number)
        layers.append(
            ExpertLayer(
                masks=torch.ones(1, 48, dtype=torch.bool),
                gate_up=torch.cat([weights.gate, weights.up])[None],
                down=weights.down[None],
                router=torch.zeros(1, 32),
            )
        )
    moe = assemble(dense, layers, top_k=1, form=FORM)
    save(moe, tokenizer, tmp_path / "twin")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(32).reshape(2, 16) * 7 % 320
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
        torch.testing.assert_close(moe(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        assert torch.equal(again(input_ids=ids).logits, moe(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gate_of_the_shared_expert_is_a_half_and_not_zero(build: Build, dtype: torch.dtype) -> None:
    """llama.cpp computes its sigmoid as silu(x) / x."""
    whole = [
        ExpertLayer(
            torch.ones(2, 48, dtype=torch.bool), torch.zeros(2, 96, 32), torch.zeros(2, 32, 48), torch.zeros(2, 32)
        )
    ] * 2
    block = moe_block(assemble(build("llama"), whole, top_k=1, form=FORM), 0)
    rows = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = rows @ block.shared_expert_gate.weight.to(dtype).float().T
        assert logits.all()
        torch.testing.assert_close(logits.sigmoid(), torch.full((1000, 1), 0.5), rtol=0, atol=1e-6)
        assert not block.shared_expert(rows).any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(sliding_window=7), "engines give a qwen2_moe no sliding window; set model.twin=auto"),
        (
            Qwen2Config(use_sliding_window=True, max_window_layers=0),
            "engines give a qwen2_moe no sliding window; choose another model$",
        ),
        (LlamaConfig(attention_bias=True), "attention_bias=true has no place"),
    ],
)
def test_what_it_has_no_place_for_is_refused(config: LlamaConfig, message: str) -> None:
    with pytest.raises(UserError, match=f"^model.path=here: {message}"):
        check_chosen(FORM, config, "here")


@pytest.mark.parametrize(
    ("config", "ways"),
    [
        (LlamaConfig(), "model.twin=qwen2_moe, or moe.shared_expert=0"),
        (MistralConfig(sliding_window=None), "model.twin=qwen2_moe, or moe.shared_expert=0"),
        (MistralConfig(sliding_window=7), "moe.shared_expert=0"),
        (Qwen3Config(), "moe.shared_expert=0"),
    ],
)
def test_ways_out_are_open(config: LlamaConfig, ways: str) -> None:
    form = Form(shares=True)
    with pytest.raises(UserError, match=f"^moe.shared_expert has no place in .*; set {ways}$"):
        check_chosen(form, config, "here")
    for way in ways.split(", or "):
        name, _, value = way.partition("=")
        check_chosen(replace(form, twin=value) if name == "model.twin" else Form(), config, "here")


def test_what_is_not_served_everywhere() -> None:
    probable, layers = Gates.probabilities, (0,)
    said = {
        ("mixtral", Gates.renormalised, ()): [],
        ("qwen3_moe", Gates.renormalised, ()): [],
        ("qwen3_moe", probable, ()): ["llama.cpp renormalises"],
        ("qwen2_moe", Gates.renormalised, ()): ["llama.cpp does not renormalise"],
        ("qwen2_moe", probable, ()): [],
        ("qwen2_moe", probable, layers): ["llama.cpp knows no dense layers"],
        ("qwen3_moe", probable, layers): ["llama.cpp renormalises", "llama.cpp knows no dense layers"],
    }
    for (name, gates, dense), beginnings in said.items():
        form = Form(twin=name, gates=gates, dense_layers=dense)
        found = twin_of(name).unserved(form, LlamaConfig(), experts=4)
        assert len(found) == len(beginnings)
        assert all(each.said.startswith(start) for each, start in zip(found, beginnings, strict=True))
        assert twin_of(name).unserved(form, LlamaConfig(), experts=1) == found[len(found) - len(dense) :]
    qwen, scaled = twin_of("qwen2_moe"), {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert all(each.engines == ("llama.cpp",) for each in found)
    form = Form(twin="qwen2_moe", gates=probable)
    mixtral = twin_of("mixtral")
    (said_of_positions,) = mixtral.unserved(Form(twin="mixtral"), LlamaConfig(rope_parameters=scaled), experts=4)
    (said_of_heads,) = mixtral.unserved(Form(twin="mixtral"), MistralConfig(head_dim=64), experts=4)
    assert said_of_positions.said.startswith("SGLang 0.5.23 leaves RoPE scaling out")
    assert said_of_heads.said.startswith("SGLang 0.5.23 takes a head of this class to be hidden size / heads wide")
    assert "RoPE scaling" in qwen.unserved(form, LlamaConfig(rope_parameters=scaled), experts=4)[0].said
    assert "hidden size / heads" in qwen.unserved(form, MistralConfig(head_dim=64), experts=4)[0].said


def test_auto_is_the_same_as_its_name() -> None:
    of = {name: form_of(composed([f"model.twin={name}"]), "llama") for name in ("auto", "mixtral", "qwen2_moe")}
    assert of["auto"] == of["mixtral"]
    assert of["qwen2_moe"].twin == "qwen2_moe"
