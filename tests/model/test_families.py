"""Configurations of the twins, parts of the freezing policy, parameter counts."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import dive
from dive.config import PARTS
from dive.errors import UserError
from dive.model.families import (
    KNOWN,
    SUPPORTED,
    TWINS,
    check_supported,
    chosen_twin,
    decoder_layers,
    empty_moe,
    ffn,
    ffn_modules,
    moe_block,
    moe_config,
    part_of,
    twin_of,
)
from tests.model.families.checks import check_twin


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "model_type 'gpt2' is not supported; choose one of llama, mistral, qwen3, qwen2"),
        (LlamaConfig(attention_bias=True), "attention_bias=true has no place"),
        (LlamaConfig(mlp_bias=True), "mlp_bias=true has no place"),
    ],
)
def test_what_has_no_twin_is_refused(config: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^model.path=here: {message}"):
        check_supported(config, "here")


def test_from_the_dense_model_to_the_export(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    check_twin(dense, tokenizer, tmp_path)


def test_the_twins_configuration(dense: PreTrainedModel) -> None:
    config = moe_config(dense.config, width=24, experts=4, top_k=2)
    assert (config.num_experts, config.num_experts_per_tok) == (4, 2)
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
    assert (config.sliding_window or None) == getattr(dense.config, "sliding_window", None)
    # Through the file and back, and into a model.
    again = AutoConfig.for_model(**config.to_dict())
    assert again.rope_parameters == dense.config.rope_parameters
    model = empty_moe(config, torch.float32)
    assert moe_block(model, 0).experts.gate_up_proj.shape == (4, 48, 32)
    attention, twin = decoder_layers(dense)[0].self_attn, decoder_layers(model)[0].self_attn
    assert {n: p.shape for n, p in attention.named_parameters()} == {n: p.shape for n, p in twin.named_parameters()}


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
    parts = {name: part_of(model, name) for name, _ in model.named_parameters()}
    tied = dense.config.tie_word_embeddings
    assert set(parts.values()) - {"ffn"} == set(PARTS) - ({"head"} if tied else set())
    for name, part in parts.items():
        end = name.rsplit(".", 1)[0]
        assert part == (
            "ffn" if "shared_expert" in name
            else "norms" if end.endswith("norm")
            else "attention" if end.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))
            else "router" if end.endswith("gate")
            else "experts" if "experts" in name
            else "head" if end == "lm_head"
            else "embeddings"
        ), name  # fmt: skip
    with pytest.raises(ValueError, match="belongs to no part"):
        part_of(model, "model.something.weight")


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


def test_a_model_type_leads_to_its_twin() -> None:
    assert [twin_of(name).name for name in ("llama", "mistral", "qwen3", "qwen2")] == [
        *("mixtral", "mixtral", "qwen3_moe", "qwen2_moe")
    ]
    assert all(twin_of(twin.name) is twin for twin in TWINS)
    assert len(set(KNOWN)) == len(KNOWN)  # or one twin would hide another
    with pytest.raises(ValueError, match="'gpt2' belongs to no family"):
        twin_of("gpt2")


@pytest.mark.parametrize(
    ("model_type", "name", "found"),
    [
        ("llama", "auto", "mixtral"),
        ("llama", "mixtral", "mixtral"),
        ("mistral", "qwen2_moe", "qwen2_moe"),
        ("qwen3", "qwen3_moe", "qwen3_moe"),
        ("llama", "qwen3_moe", "auto, mixtral, qwen2_moe"),
        ("qwen3", "mixtral", "auto, qwen3_moe"),
        ("qwen2", "Mixtral", "auto, qwen2_moe"),
    ],
)
def test_a_twin_is_chosen_among_those_of_the_dense_model(model_type: str, name: str, found: str) -> None:
    if ", " not in found:
        assert chosen_twin(model_type, name).name == found
        return
    with pytest.raises(UserError, match=f"^model.twin={name}: .* '{model_type}' .*; choose one of {found}$"):
        chosen_twin(model_type, name)


def test_all_twins_of_a_dense_model_know_it_alike() -> None:
    """Nobody chooses one to run the dense model."""
    of_dense = (
        "embeddings",
        "layers",
        "rotary",
        "norm",
        "head",
        "attention",
        "ffn",
        "projections",
        "activation",
        "head_dim",
    )
    for name in SUPPORTED:
        twins = [twin for twin in TWINS if name in twin.dense]
        assert len({tuple(getattr(twin, place) for place in of_dense) for twin in twins}) == 1
        assert len({name in twin.biased for twin in twins}) == 1


PACKAGE = Path(dive.__file__).parent
KEPT = {"embed_tokens", "lm_head", "self_attn", "rotary_emb", "gate_proj", "up_proj", "num_local_experts"}
KEPT |= {name for twin in TWINS for name in (twin.block, twin.block_on_disk, *twin.dense, twin.name)}
"""Names that only the families may use. ``down_proj`` and ``act_fn`` stand in every stock class's fused experts as well."""


STANDS_ALONE = "engines/worker.py"
"""Runs in an engine's own interpreter, on the engine's own classes, and can import nothing from here."""


@pytest.mark.parametrize(
    "file",
    [
        name
        for p in sorted(PACKAGE.rglob("*.py"))
        if p.parent.name != "families" and (name := p.relative_to(PACKAGE).as_posix()) != STANDS_ALONE
    ],
)
def test_nothing_else_knows_how_a_family_is_built(file: str) -> None:
    # llama.cpp is an engine.
    texts = (re.sub(r"llama([.-]cpp|-server)", "", text) for text in attributes_and_strings(PACKAGE / file))
    used = {word for text in texts for word in re.findall(r"\w+", text)}
    assert not used & KEPT


def attributes_and_strings(file: Path) -> Iterator[str]:
    """Of the code, without its docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.value


def test_they_are_asked_without_torch() -> None:
    code = "import sys, dive.model.families; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
