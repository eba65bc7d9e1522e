"""Layers that stay dense, from the construction to the export and through retraining."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dive.api import reconstruct
from dive.config import (
    Freezing,
    FreezingConfig,
    LoRAConfig,
    MoEConfig,
    PlainConfig,
    PruningConfig,
    RefinedConfig,
)
from dive.errors import UserError
from dive.model.families import decoder_layers, ffn, sparse_layers
from dive.moe.build import build_layers
from dive.moe.layer import layer_output
from dive.moe.plug import plug_routers, routers
from dive.moe.walk import TokenWalk
from dive.pruning.calibrate import collect_statistics
from dive.retrain.freezing import apply_policy, trained_table
from tests.model.families.checks import check_twin
from tests.workplace import Workplace

Build = Callable[..., PreTrainedModel]
Tokens = Callable[..., Tensor]
OVERRIDES = ("model.twin=qwen2_moe", "moe.dense_layers=[2,0]")
PRUNING = PruningConfig(ratio=0.5)


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("variant", ["llama", "qwen3", "qwen2"])
def test_they_are_the_dense_models_own(build: Build, tokens: Tokens, variant: str) -> None:
    dense = build(variant, num_hidden_layers=4)
    chosen = OVERRIDES if variant == "llama" else OVERRIDES[1:]
    moe = reconstruct(dense, {"all": tokens(8, 16)}, [*chosen, "moe.refined.steps=2"], experts=2, ratio=0.5)
    assert moe.config.mlp_only_layers == [0, 2]
    assert sparse_layers(moe.config) == [1, 3]
    source, own = dense.state_dict(), moe.state_dict()
    for number in range(4):
        name = f"model.layers.{number}.mlp.gate_proj.weight"
        assert (name in own) is (number in (0, 2))
        assert number in (1, 3) or torch.equal(own[name], source[name])


def test_with_the_others_pruned_of_nothing_it_is_the_dense_model(build: Build, tokens: Tokens) -> None:
    dense = build("llama", num_hidden_layers=4)
    for number in (1, 3):
        ffn(dense, number).up[::6] = 0.0  # 8 channels that never fire
    moe = reconstruct(dense, {"all": tokens(40, 16)}, OVERRIDES, experts=1, ratio=8 / 48)
    ids = tokens(2, 16, seed=5)
    torch.testing.assert_close(logits(moe, ids), logits(dense, ids), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
@pytest.mark.parametrize("layers", ["[0]", "[2,1]", "[3]"])
def test_from_the_dense_model_to_the_export(
    build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, variant: str, layers: str
) -> None:
    chosen = (*(OVERRIDES[:1] if variant == "llama" else ()), f"moe.dense_layers={layers}")
    check_twin(build(variant, num_hidden_layers=4), tokenizer, tmp_path, chosen)


@pytest.mark.parametrize("construction", [RefinedConfig(steps=2), PlainConfig()])
def test_they_are_passed_by_in_building(
    build: Build, tokens: Tokens, construction: RefinedConfig | PlainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, groups = build(num_hidden_layers=4), [tokens(4, 16, seed=1), tokens(4, 16, seed=2)]
    name = "refined" if isinstance(construction, RefinedConfig) else "plain"
    moe = MoEConfig(experts=2, dense_layers=[0, 2], **{name: construction})  # type: ignore[arg-type]
    whole = list(build_layers(dense, groups, PRUNING, moe, batch=4, seed=0))
    assert len(whole) == 2
    rest = list(build_layers(dense, groups, PRUNING, moe, batch=4, seed=0, finished=whole[:1]))
    assert len(rest) == 1
    for tensor, other in zip(whole[1].tensors().values(), rest[0].tensors().values(), strict=True):
        assert torch.equal(tensor, other)


def test_the_rebuilt_track_passes_through_them(build: Build, tokens: Tokens) -> None:
    dense, text = build(num_hidden_layers=3), [tokens(4, 16)]
    moe = MoEConfig(experts=2, dense_layers=[1], refined=RefinedConfig(steps=0, correction=0.0))
    walk = TokenWalk(dense, text, PRUNING, moe, batch=4, seed=0)
    first = next(build_layers(dense, text, PRUNING, moe, batch=4, seed=0))
    walk.read(0)
    walk.leave(first)
    walk.keep(1)
    found = walk.read(2).inputs
    # The model with the first layer's experts in the place of its FFN.
    weights, mlp = ffn(dense, 0), decoder_layers(dense)[0].mlp
    mlp.forward = lambda x: layer_output(first, weights.act, x.flatten(0, -2), top_k=1).view_as(x)
    seen: list[Tensor] = []
    decoder_layers(dense)[2].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(dense, text[0])
    torch.testing.assert_close(found, seen[0].flatten(0, -2), rtol=1e-4, atol=1e-4)


def test_from_statistics(build: Build, tokens: Tokens) -> None:
    dense = build(num_hidden_layers=4)
    statistics = list(collect_statistics(dense, {"a": tokens(4, 16), "b": tokens(4, 16, seed=1)}).values())
    moe = reconstruct(dense, statistics, [*OVERRIDES[:1], "moe.dense_layers=[1]"], ratio=0.5)
    other = reconstruct(dense, statistics, [*OVERRIDES[:1]], ratio=0.5)
    for number in (0, 2, 3):
        one, two = (decoder_layers(model)[number].mlp.experts.down_proj for model in (moe, other))
        assert torch.equal(one, two)


def test_no_stage_trains_them(build: Build, tokens: Tokens) -> None:
    dense = build(num_hidden_layers=4)
    moe = reconstruct(dense, {"all": tokens(8, 16)}, [*OVERRIDES, "moe.refined.steps=0"], experts=2, ratio=0.5)
    plug_routers(moe)
    assert len(routers(moe)) == 2
    everything = FreezingConfig(
        **dict.fromkeys(("router", "experts", "norms", "attention", "embeddings", "head"), Freezing.full)
    )
    apply_policy(moe, everything, LoRAConfig())
    frozen = {name for name, parameter in moe.named_parameters() if not parameter.requires_grad}
    kept = {f"model.layers.{n}.mlp.{p}_proj.weight" for n in (0, 2) for p in ("gate", "up", "down")}
    assert {name for name in frozen if "shared_expert" not in name} == kept
    table = {part: (total, trained) for part, total, trained in trained_table(moe)}
    beside = 32 * (3 * 8 + 1)
    assert table["ffn"] == (2 * 3 * 32 * 48 + 2 * beside, 0)
    assert sum(total for total, _ in table.values()) == sum(parameter.numel() for parameter in moe.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["moe.dense_layers=[0]"],
            r"moe.dense_layers=\[0\] has no place in mixtral, .*; set model.twin=qwen2_moe, or moe.dense_layers=\[\]$",
        ),
        ([*OVERRIDES], r"moe.dense_layers=\[0,2\]: the model's 2 layers are numbered from 0 to 1$"),
        (
            [OVERRIDES[0], "moe.dense_layers=[1,0]"],
            r"moe.dense_layers=\[0,1\] leaves no layer to have experts; take one",
        ),
        ([OVERRIDES[0], "moe.dense_layers=[1,1]"], r"moe.dense_layers names 1 twice$"),
        ([OVERRIDES[0], "moe.dense_layers=[-1]"], r"moe.dense_layers\[0\] \(-1\) must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(build: Build, tokens: Tokens, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        reconstruct(build("llama"), {"all": tokens(2, 16)}, overrides, experts=2, ratio=0.5)


@pytest.mark.parametrize("load", ["full", "streamed"])
def test_a_run(workplace: Workplace, load: str) -> None:
    """Its record speaks of the layers by their own numbers."""
    streamed = ("affinity=random", "retrain=none", "eval.generations=0", "model.load=streamed")
    overrides = ("model.twin=qwen2_moe", "moe.dense_layers=[0]", "moe.refined.steps=2", "moe.gates=probabilities")
    without = Workplace(workplace.root, workplace.root / "dense", workplace.root / "domains")
    if load == "streamed":
        without.settings = [
            s for s in workplace.settings if not s.startswith(("retrain", "affinity=", "eval.generations"))
        ]
    results = without.run(
        f"dense-layers-{load}",
        *overrides,
        *(streamed if load == "streamed" else ("retrain.stages.router.mode=sparse",)),
    )
    model, report = AutoModelForCausalLM.from_pretrained(results["export"], output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.mlp_only_layers, model.config.norm_topk_prob) == ([0], False)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert results["parameters"]["total"] == results["plan"]["planned"]["parameters"]["total"] == total
    assert results["parameters"]["active"] == results["plan"]["planned"]["parameters"]["active"]
    if load == "streamed":
        return
    assert results["parameters"]["trained"] == results["plan"]["planned"]["parameters"]["trained"]
    assert results["routing"]["layers"] == [1]
    assert [len(rows) for rows in results["routing"]["share_by_layer"].values()] == [1] * 4
    logged = (workplace.root / "dense-layers-full" / "csv" / "retrain" / "metrics.csv").read_text().splitlines()[0]
    assert "router_entropy/layer_01" in logged
    assert "router_entropy/layer_00" not in logged
    page = (workplace.root / "dense-layers-full" / "report.html").read_text()
    assert '"layers":[1]' in page.replace(" ", "")
