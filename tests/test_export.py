"""What is saved loads anywhere: the stock class, the same logits, the usual layout on disk."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)

import dive
from dive.api import reconstruct
from dive.config import Freezing, FreezingConfig, LoRAConfig, MoEConfig, PruningConfig, RefinedConfig
from dive.errors import UserError
from dive.export import (
    has_expert_bias,
    load_with_expert_bias,
    save,
    save_streamed,
    save_with_expert_bias,
    verify,
)
from dive.model.families import moe_block
from dive.model.load import load_weights, locate_dense
from dive.model.streamed import load_streamed
from dive.moe.assemble import assemble
from dive.moe.build import build_layers
from dive.moe.layer import ExpertLayer
from dive.moe.plug import plug_routers
from dive.retrain.freezing import apply_policy

Tokens = Callable[..., Tensor]
MakeMoE = Callable[..., Any]
CPU = torch.device("cpu")


@pytest.fixture
def make_moe(tokens: Tokens) -> MakeMoE:
    def make(dense: PreTrainedModel, **settings: Any) -> PreTrainedModel:
        statistics = dive.collect_statistics(dense, {str(i): tokens(2, 16, seed=i) for i in range(3)})
        return reconstruct(
            dense, list(statistics.values()), **{"ratio": 0.5, "top_k": 2, "router_init": "random", **settings}
        )

    return make


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def reloaded(directory: Path, **settings: Any) -> Any:
    """An export as any user would load it; it has every tensor, and no other."""
    again, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **settings)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return again


def test_it_reloads_as_the_stock_class(
    dense: PreTrainedModel, make_moe: MakeMoE, tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    moe = make_moe(dense)
    expected = logits(moe, tokens(2, 10))
    assert save(moe, tokenizer, tmp_path / "moe", card="# A card\n") == tmp_path / "moe"

    again = reloaded(tmp_path / "moe")
    others = {"qwen3": Qwen3MoeForCausalLM, "qwen2": Qwen2MoeForCausalLM}
    assert type(again) is others.get(dense.config.model_type, MixtralForCausalLM)
    assert again.dtype == torch.float32
    torch.testing.assert_close(logits(again, tokens(2, 10)), expected, rtol=1e-4, atol=1e-4)
    tied = dense.config.tie_word_embeddings
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = tokens(1, 6)
    assert torch.equal(again.generate(ids, **settings), moe.generate(ids, **settings))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert loaded("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    assert (tmp_path / "moe" / "README.md").read_text() == "# A card\n"
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen3"])
def test_the_head_is_written_whether_it_is_tied_or_not(
    build: Callable[..., PreTrainedModel],
    tokens: Tokens,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    variant: str,
) -> None:
    """SGLang never ties it, and serves what its memory held before."""
    dense = build(variant)
    tied = dense.config.tie_word_embeddings
    streamed, layers = stream(dense, tokens, tmp_path)
    save_streamed(streamed, layers, tokenizer, tmp_path / "streamed", top_k=1)
    save(assemble(dense, layers, top_k=1), tokenizer, tmp_path / "whole")
    for kind in ("streamed", "whole"):
        files = (tmp_path / kind).glob("*.safetensors")
        stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"]) is tied
        assert torch.equal(stored["lm_head.weight"], dense.lm_head.weight)
        again = reloaded(tmp_path / kind)
        assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
        written = sum(tensor.numel() for tensor in stored.values())
        assert written == again.num_parameters() + tied * dense.lm_head.weight.numel()


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        (
            "llama",
            ["block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2"],
        ),
        ("qwen3", ["mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"]),
    ],
)
def test_the_layout_on_disk_is_the_one_engines_read(
    build: Callable[..., PreTrainedModel],
    make_moe: MakeMoE,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    variant: str,
    names: list[str],
) -> None:
    moe = make_moe(build(variant))
    save(moe, tokenizer, tmp_path / "moe")
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    experts = moe_block(moe, 1).experts
    gate, up = experts.gate_up_proj[2].chunk(2)
    for name, tensor in zip(names, (gate, up, experts.down_proj[2]), strict=True):
        assert torch.equal(stored[f"model.layers.1.{name.format(2)}.weight"], tensor)
    assert not any("gate_up_proj" in name or "lora" in name or "noise" in name for name in stored)
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["model_type"] == ("mixtral" if variant == "llama" else "qwen3_moe")
    assert config["num_experts_per_tok"] == 2
    assert config["num_key_value_heads"] == 2


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen3"])
def test_releases_before_transformers_5_find_the_names_they_know(
    build: Callable[..., PreTrainedModel],
    make_moe: MakeMoE,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    variant: str,
) -> None:
    scaling = variant == "llama-tied"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    save(make_moe(build(variant)), loaded, tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["rope_theta"] == 10000.0
    assert ("rope_scaling" in config) is scaling
    if scaling:  # their rope_scaling has every key but the base
        assert config["rope_scaling"] == {k: v for k, v in config["rope_parameters"].items() if k != "rope_theta"}
    assert config["num_experts" if variant == "qwen3" else "num_local_experts"] == 3
    settings = json.loads((tmp_path / "moe" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only"} & set(settings)


def test_the_sentencepiece_model_goes_along(
    build: Callable[..., PreTrainedModel], make_moe: MakeMoE, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "dense")
    settings = json.loads((tmp_path / "dense" / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "LlamaTokenizer"
    (tmp_path / "dense" / "tokenizer_config.json").write_text(json.dumps(settings))
    save(make_moe(build()), AutoTokenizer.from_pretrained(tmp_path / "dense"), tmp_path / "without")
    assert not (tmp_path / "without" / "tokenizer.model").exists()
    (tmp_path / "dense" / "tokenizer.model").write_bytes(b"scores")
    save(make_moe(build()), AutoTokenizer.from_pretrained(tmp_path / "dense"), tmp_path / "moe")
    assert (tmp_path / "moe" / "tokenizer.model").read_bytes() == b"scores"


def test_training_parts_are_merged_on_the_way(
    dense: PreTrainedModel, make_moe: MakeMoE, tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    moe = make_moe(dense)
    plug_routers(moe, noise=0.1)
    apply_policy(
        moe, FreezingConfig(router=Freezing.full, experts=Freezing.lora, attention=Freezing.lora), LoRAConfig()
    )
    torch.manual_seed(0)
    for name, parameter in moe.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = logits(moe.eval(), tokens(2, 10))
    save(moe, tokenizer, tmp_path / "moe")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    torch.testing.assert_close(logits(again, tokens(2, 10)), expected, rtol=1e-3, atol=1e-3)


def test_bfloat16_stays_bfloat16(
    build: Callable[..., PreTrainedModel], make_moe: MakeMoE, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    moe = make_moe(dense)
    assert moe.dtype == torch.bfloat16
    save(moe, tokenizer, tmp_path / "moe")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype="auto").dtype == torch.bfloat16


def test_an_existing_directory_is_replaced(
    build: Callable[..., PreTrainedModel], make_moe: MakeMoE, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    target = tmp_path / "moe"
    target.mkdir()
    (target / "old.safetensors").write_text("old")
    with pytest.raises(UserError, match="holds something else than a model"):
        save(make_moe(build()), tokenizer, target)
    (target / "config.json").write_text("{}")
    save(make_moe(build()), tokenizer, target)
    assert not (target / "old.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(target)


@pytest.mark.parametrize("what", ["a weight", "a missing tensor", "another class"])
def test_a_wrong_directory_is_noticed(
    build: Callable[..., PreTrainedModel],
    make_moe: MakeMoE,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    what: str,
) -> None:
    from safetensors.torch import save_file

    moe = make_moe(build())
    directory = save(moe, tokenizer, tmp_path / "moe")
    verify(moe, directory)
    file = directory / "model.safetensors"
    stored = load_file(file)
    if what == "a weight":
        moe_block(moe, 1).experts.down_proj[2, 3, 4] += 1e-3
        message = r"layers\.1\.mlp\.experts\.down_proj differs"
    elif what == "a missing tensor":
        del stored["model.layers.0.block_sparse_moe.gate.weight"]
        save_file(stored, file, metadata={"format": "pt"})
        message = "does not load whole: .*missing_keys"
    else:
        save(make_moe(build("qwen3")), tokenizer, directory)
        message = "loads as Qwen3MoeForCausalLM, not as MixtralForCausalLM"
    with pytest.raises(UserError, match=message):
        verify(moe, directory)


def test_a_place_that_cannot_be_written(
    build: Callable[..., PreTrainedModel], make_moe: MakeMoE, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save(make_moe(build()), tokenizer, tmp_path / "file" / "moe")


# ---------------------------------------------------------------------------------------------------- expert biases


def test_biases_are_not_dropped_silently(
    build: Callable[..., PreTrainedModel], make_moe: MakeMoE, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    moe = make_moe(build(), compensation="bias")
    assert has_expert_bias(moe)
    assert not has_expert_bias(make_moe(build()))
    with pytest.raises(UserError, match="drop them silently"):
        save(moe, tokenizer, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
    with pytest.raises(UserError, match="put expert_bias in its name"):
        save_with_expert_bias(moe, tokenizer, tmp_path / "moe")


def test_the_directory_with_biases_goes_there_and_back(
    dense: PreTrainedModel, make_moe: MakeMoE, tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    moe = make_moe(dense, compensation="bias")
    expected = logits(moe, tokens(2, 10))
    directory = save_with_expert_bias(moe, tokenizer, tmp_path / "moe-expert_bias", card="# A card\n")
    again = load_with_expert_bias(directory)
    assert type(again) is type(moe)
    assert torch.equal(moe_block(again, 1).experts.down_bias, moe_block(moe, 1).experts.down_bias)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is dense.config.tie_word_embeddings
    torch.testing.assert_close(logits(again, tokens(2, 10)), expected, rtol=1e-5, atol=1e-5)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(again.generate(tokens(1, 6), **settings), moe.generate(tokens(1, 6), **settings))
    readme = (directory / "README.md").read_text()
    assert readme.startswith("> **Not a stock model.**")
    assert readme.endswith("# A card\n")
    with pytest.raises(ValueError, match="dive_moe_with_expert_bias"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_anything_else_is_not_loaded_with_biases(build: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_with_expert_bias(tmp_path)
    build().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="load it with transformers"):
        load_with_expert_bias(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_it_is_the_same_checkpoint(
    dense: PreTrainedModel, tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Tensor by tensor, and the configurations byte by byte, what the assembled model saves."""
    streamed, layers = stream(dense, tokens, tmp_path)
    save_streamed(
        streamed,
        iter(layers),
        tokenizer,
        tmp_path / "streamed",
        top_k=2,
        dtype=dtype,
        card="# A card\n",
        shard_bytes=20_000,
    )
    moe = assemble(
        load_weights(locate_dense(str(tmp_path / "dense")), dtype=torch.float32, device=CPU), layers, top_k=2
    )
    save(moe, tokenizer, tmp_path / "whole", dtype=dtype, card="# A card\n")

    stored = load_file(tmp_path / "whole/model.safetensors")
    shards = sorted((tmp_path / "streamed").glob("*.safetensors"))
    found = {name: (file.name, tensor) for file in shards for name, tensor in load_file(file).items()}
    assert len(shards) > 2
    assert found.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, (_, tensor) in found.items())
    assert all(tensor.dtype == dtype for _, tensor in found.values())
    index = json.loads((tmp_path / "streamed/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in stored.values())
    others = {p.name for p in (tmp_path / "whole").iterdir()} - {"model.safetensors"}
    assert others | {file.name for file in shards} | {"model.safetensors.index.json"} == {
        p.name for p in (tmp_path / "streamed").iterdir()
    }
    for name in others:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

    again = reloaded(tmp_path / "streamed", dtype="auto")
    assert type(again) is type(moe)
    torch.testing.assert_close(logits(again, tokens(2, 10)), logits(moe, tokens(2, 10)))


def test_streamed_a_crash_leaves_nothing_that_looks_finished(
    build: Callable[..., PreTrainedModel], tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    streamed, layers = stream(build(), tokens, tmp_path)
    target = tmp_path / "out" / "moe"

    def breaking() -> Iterator[ExpertLayer]:
        yield layers[0]
        assert not target.exists()
        (working,) = target.parent.iterdir()
        assert any(working.glob("*.safetensors"))  # under way
        assert not any((working / name).exists() for name in ("config.json", "model.safetensors.index.json"))
        with pytest.raises(ValueError, match="Unrecognized model"):  # what SIGKILL would leave now
            AutoModelForCausalLM.from_pretrained(working)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_streamed(streamed, breaking(), tokenizer, target, top_k=1, shard_bytes=20_000)
    assert not any(target.parent.iterdir())
    with pytest.raises(UserError, match="parameters were written"):
        save_streamed(streamed, layers[:1], tokenizer, target, top_k=1)
    assert not any(target.parent.iterdir())
    save_streamed(streamed, layers, tokenizer, target, top_k=1)
    assert [p.name for p in target.parent.iterdir()] == ["moe"]
    with pytest.raises(UserError, match="parameters were written"):
        save_streamed(streamed, layers[:1], tokenizer, target, top_k=1)
    AutoModelForCausalLM.from_pretrained(target)  # the one that was there stays


def stream(dense: PreTrainedModel, tokens: Tokens, root: Path) -> tuple[PreTrainedModel, list[ExpertLayer]]:
    """(the model, streamed from disk; experts of its layers)"""
    dense.save_pretrained(root / "dense", max_shard_size="40KB")
    streamed = load_streamed(locate_dense(str(root / "dense")), dtype=torch.float32, device=CPU)
    groups = [tokens(4, 16, seed=seed) for seed in (1, 2, 3)]
    moe = MoEConfig(experts=3, top_k=2, refined=RefinedConfig(rounds=0, sequential=False, steps=0))
    return streamed, list(build_layers(streamed, groups, PruningConfig(), moe, batch=4, seed=0))


@pytest.mark.parametrize("kind", ["stock", "streamed", "biased"])
def test_the_chat_template_goes_along(
    build: Callable[..., PreTrainedModel],
    make_moe: MakeMoE,
    tokens: Tokens,
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    kind: str,
) -> None:
    dense = build("llama", eos_token_id=[1, 7])  # an end of text, and one of a turn
    target = tmp_path / "expert_bias"
    if kind == "streamed":
        streamed, layers = stream(dense, tokens, tmp_path)
        save_streamed(streamed, layers, chat_tokenizer, target, top_k=1)
    elif kind == "stock":
        save(make_moe(dense), chat_tokenizer, target)
    else:
        save_with_expert_bias(make_moe(dense, compensation="bias"), chat_tokenizer, target)
    messages = [{"role": "user", "content": "the cat"}]
    again = AutoTokenizer.from_pretrained(target)
    for prompt in (False, True):
        found, expected = (
            t.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"] for t in (again, chat_tokenizer)
        )
        assert found == expected
    if kind != "biased":
        assert AutoModelForCausalLM.from_pretrained(target).generation_config.eos_token_id == [1, 7]
