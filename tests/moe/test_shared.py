"""A shared expert, from the construction to the export and through retraining."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dive.api import reconstruct
from dive.cli import composed
from dive.config import (
    PARTS,
    ArchitectureConfig,
    CoactivationConfig,
    Compensation,
    ConstructionConfig,
    Freezing,
    FreezingConfig,
    Gates,
    LoRAConfig,
    MoEConfig,
    PlainConfig,
    PruningConfig,
    RandomSplitConfig,
    RefinedConfig,
    UpcycleConfig,
)
from dive.errors import UserError
from dive.export import save, save_streamed
from dive.model.families import count_parameters, ffn, moe_block, part_of
from dive.model.families.twin import Form
from dive.model.load import load_weights, locate_dense
from dive.model.streamed import load_streamed
from dive.moe.assemble import assemble, assemble_indexed
from dive.moe.build import build_layers
from dive.moe.layer import ExpertLayer, layer_output
from dive.moe.plug import plug_routers, unplug
from dive.plan.parameters import adapter_sizes, full_sizes, shapes
from dive.pruning.calibrate import collect_statistics
from dive.pruning.metrics import importance
from dive.pruning.statistics import batch_statistics
from dive.retrain.freezing import apply_policy
from tests.model.families.checks import tensors
from tests.workplace import Workplace

Build = Callable[..., PreTrainedModel]
Tokens = Callable[..., Tensor]
FORM = Form(twin="qwen2_moe", shares=True)
OVERRIDES = ("model.twin=qwen2_moe", "moe.shared_expert=0.5")
CONSTRUCTIONS: dict[str, ConstructionConfig] = {
    "refined": RefinedConfig(steps=4),
    "plain": PlainConfig(),
    "random_split": RandomSplitConfig(),
    "coactivation": CoactivationConfig(),
    "upcycle": UpcycleConfig(),
}


def settings(name: str, *, experts: int = 2, **changed: Any) -> MoEConfig:
    return MoEConfig(experts=experts, shared_expert=0.67, **{name: CONSTRUCTIONS[name]}, **changed)


def built(dense: PreTrainedModel, tokens: Tokens, moe: MoEConfig, pruning: PruningConfig) -> list[ExpertLayer]:
    groups = [tokens(8, 16, seed=1), tokens(8, 16, seed=2)] if moe.plain else [tokens(16, 16, seed=1)]
    return list(build_layers(dense, groups, pruning, moe, batch=4, seed=0))


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_it_has_the_most_important_channels_and_the_others_none_of_them(
    build: Build, tokens: Tokens, name: str
) -> None:
    dense = build()
    layers = built(dense, tokens, settings(name), PruningConfig(ratio=0.5))
    text = torch.cat([tokens(8, 16, seed=1), tokens(8, 16, seed=2)]) if name == "plain" else tokens(16, 16, seed=1)
    statistics = collect_statistics(dense, {"all": text})["all"]
    for number, layer in enumerate(
        layers[: 1 if name == "refined" else 2]
    ):  # whose tokens come through the rebuilt prefix
        weights = ffn(dense, number)
        scores = importance(PruningConfig().metric, weights, statistics.layer(number))
        chosen = scores.argsort(descending=True)[:16].sort().values
        assert layer.shared is not None
        assert torch.equal(layer.shared[0], torch.cat([weights.gate[chosen], weights.up[chosen]]))
        assert torch.equal(layer.shared[1], weights.down[:, chosen])
        assert layer.masks.sum(dim=1).tolist() == [8, 8]  # 24 of 48 in all
        assert not layer.masks[:, chosen].any()
        if name in ("plain", "upcycle"):
            for mask, gate_up in zip(layer.masks, layer.gate_up, strict=True):
                assert torch.equal(gate_up, torch.cat([weights.gate[mask], weights.up[mask]]))


@pytest.mark.parametrize("gates", ["renormalised", "probabilities"])
@pytest.mark.parametrize("name", ["default", "plain", "upcycle"])
def test_where_nothing_is_lost_it_is_the_dense_model(build: Build, tokens: Tokens, name: str, gates: str) -> None:
    dense = build("llama")
    for number in range(2):
        ffn(dense, number).up[::6] = 0.0  # 8 channels that never fire; 40 stay, 16 of them shared
    text: Any = [tokens(20, 16, seed=1), tokens(20, 16, seed=2)] if name == "plain" else {"all": tokens(40, 16)}
    settings = ["model.twin=qwen2_moe", "moe.shared_expert=0.4", f"moe={name}", f"moe.gates={gates}"]
    settings += ["moe.refined.steps=0"] if name == "default" else ["pruning.metric=wifv"]
    moe = reconstruct(dense, text, settings, experts=2, ratio=8 / 48)
    assert (moe.config.shared_expert_intermediate_size, moe.config.moe_intermediate_size) == (16, 24)
    if gates == "renormalised":
        ids = tokens(2, 16, seed=5)
        torch.testing.assert_close(logits(moe, ids), logits(dense, ids), rtol=1e-3, atol=3e-3)
    else:  # whatever the gates, what is shared is not theirs to shrink
        rows = torch.randn(9, 32)
        block, weights = moe_block(moe, 0), ffn(dense, 0)
        block.experts.down_proj.zero_()
        down = block.shared_expert.down_proj.weight
        columns = [int((column == weights.down.T * 2).all(dim=1).nonzero()) for column in down.T]
        torch.testing.assert_close(
            block(rows[None])[0], weights.channels(rows)[:, columns] @ weights.down[:, columns].T, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("gates", list(Gates))
def test_the_layers_output_is_the_stock_blocks(build: Build, tokens: Tokens, gates: Gates, top_k: int) -> None:
    dense = build("llama")
    layers = built(dense, tokens, settings("refined", top_k=top_k, gates=gates), PruningConfig(ratio=0.5))
    stock = assemble(dense, layers, top_k=top_k, form=Form(twin="qwen2_moe", gates=gates, shares=True))
    rows = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    for number in range(2):
        found = layer_output(layers[number], ffn(dense, number).act, rows, top_k=top_k, gates=gates)
        torch.testing.assert_close(found, moe_block(stock, number)(rows[None])[0], rtol=1e-4, atol=1e-4)


def test_both_exports_and_the_plan(
    build: Build, tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dense, cpu = build("llama"), torch.device("cpu")
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    source = locate_dense(str(tmp_path / "dense"))
    layers = built(dense, tokens, settings("plain"), PruningConfig(ratio=0.5))
    moe = assemble(load_weights(source, dtype=torch.float32, device=cpu), layers, top_k=1, form=FORM)
    expected = logits(moe, tokens(2, 16))
    save(moe, tokenizer, tmp_path / "assembled")
    streamed = load_streamed(source, dtype=torch.float32, device=cpu)
    save_streamed(streamed, layers, tokenizer, tmp_path / "streamed", top_k=1, form=FORM)
    one, other = tensors(tmp_path / "assembled"), tensors(tmp_path / "streamed")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again, tokens(2, 16)), expected)

    figures = {name: getattr(dense.config, name, None) for name in ArchitectureConfig.__dataclass_fields__}
    architecture = ArchitectureConfig(**figures | {"dtype": "float32"})
    config = composed(
        ["model.twin=qwen2_moe", "moe.shared_expert=0.67", "moe.experts=2", "pruning.ratio=0.5", "retrain.lora.rank=4"]
    )
    s = shapes(architecture, config)
    assert (s.total, s.active) == count_parameters(moe.config)
    sizes: Counter[str] = Counter()
    for name, parameter in moe.named_parameters():
        sizes[part_of(moe, name)] += parameter.numel()
    assert sizes["ffn"] == 2 * 32  # the shared experts' gates
    assert full_sizes(s) == {part: sizes[part] for part in PARTS}
    plug_routers(moe)
    apply_policy(moe, FreezingConfig(experts=Freezing.lora), LoRAConfig(rank=4))
    assert adapter_sizes(s)["experts"] == sum(p.numel() for p in moe.parameters() if p.requires_grad)


def test_it_is_trained_with_the_experts(build: Build, tokens: Tokens) -> None:
    moe = assemble(
        build("llama"), built(build("llama"), tokens, settings("plain"), PruningConfig(ratio=0.5)), top_k=1, form=FORM
    )
    plug_routers(moe)
    apply_policy(moe, FreezingConfig(experts=Freezing.full), LoRAConfig())
    trained = {name for name, parameter in moe.named_parameters() if parameter.requires_grad}
    of_block = {"experts.gate_up_proj", "experts.down_proj"} | {
        f"shared_expert.{n}_proj.weight" for n in ("gate", "up", "down")
    }
    assert trained == {f"model.layers.{number}.mlp.{name}" for number in range(2) for name in of_block}


def test_its_adapters_are_merged(build: Build, tokens: Tokens) -> None:
    moe = assemble(
        build("llama"), built(build("llama"), tokens, settings("plain"), PruningConfig(ratio=0.5)), top_k=1, form=FORM
    )
    names = set(moe.state_dict())
    plug_routers(moe)
    apply_policy(moe, FreezingConfig(experts=Freezing.lora), LoRAConfig(rank=4))
    before = logits(moe, tokens(2, 16))
    for name, parameter in moe.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    adapted = logits(moe, tokens(2, 16))
    assert not torch.allclose(adapted, before, atol=1e-2)
    unplug(moe)
    assert set(moe.state_dict()) == names
    torch.testing.assert_close(logits(moe, tokens(2, 16)), adapted, rtol=1e-3, atol=1e-3)


def test_beside_experts_that_are_index_sets(build: Build, tokens: Tokens) -> None:
    dense = build("llama")
    pruning = PruningConfig(ratio=0.5, compensation=Compensation.none)
    layers = built(dense, tokens, settings("plain"), pruning)
    models = [make(dense, layers, top_k=1, form=FORM) for make in (assemble, assemble_indexed)]
    one, other = (logits(model, tokens(2, 16)) for model in models)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_statistics_of_some_channels_are_those_of_a_narrower_ffn() -> None:
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    kept = torch.arange(12) % 3 > 0
    inputs = torch.randn(5, 4)
    whole = batch_statistics(rows, second_moment=True, inputs=inputs, active_channels=12)
    whole.taylor = torch.arange(12.0)[None]
    found = whole.of_channels(kept)
    wanted = batch_statistics(rows[:, kept], second_moment=True, inputs=inputs, active_channels=12)
    for name in ("mean", "squared_deviations", "second_moment", "inputs", "coactivation"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
    assert found.taylor is not None
    assert found.taylor.tolist() == [[1.0, 2.0, 4.0, 5.0, 7.0, 8.0, 10.0, 11.0]]
    assert found.count == 50


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "moe.shared_expert has no place in mixtral; set model.twin=qwen2_moe, or moe.shared_expert=0"),
        (
            ("model.twin=qwen2_moe", "pruning.ratio=0.66"),
            r"moe.shared_expert \(0.5\) takes 8 of an expert's 16 channels; it",
        ),
        (
            ("model.twin=qwen2_moe", "moe.shared_expert=0.99"),
            r"moe.shared_expert \(0.99\) takes 24 of an expert's 24 channels",
        ),
        (("model.twin=qwen2_moe", "moe.shared_expert=1"), r"moe.shared_expert \(1.0\) must be at least 0 and below 1"),
    ],
)
def test_what_cannot_be_is_refused(build: Build, tokens: Tokens, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        reconstruct(
            build("llama"),
            {"all": tokens(2, 16)},
            ["moe.shared_expert=0.5", "pruning.ratio=0.5", *overrides],
            experts=2,
        )


def test_a_run(workplace: Workplace) -> None:
    place = Workplace(workplace.root, workplace.root / "dense", workplace.root / "domains")
    overrides = ("model.twin=qwen2_moe", "moe.shared_expert=0.67", "moe.refined.steps=2", "moe.gates=probabilities")
    results = place.run("shared-expert", *overrides, "retrain.stages.router.mode=sparse")
    model, report = AutoModelForCausalLM.from_pretrained(results["export"], output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    counts, planned = results["parameters"], results["plan"]["planned"]["parameters"]
    assert counts["total"] == planned["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["active"] == planned["active"]
    assert counts["trained"] == planned["trained"]
