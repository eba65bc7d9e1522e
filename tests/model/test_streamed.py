"""A streamed model gives what the loaded one gives, a layer at a time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from dive.config import MoEConfig, PruningConfig, RefinedConfig
from dive.errors import UserError
from dive.model.families import decoder_layers, ffn
from dive.model.load import load_weights, locate_dense
from dive.model.streamed import Checkpoint, load_streamed
from dive.moe.build import build_layers
from dive.pruning.calibrate import collect_statistics

Build = Callable[..., PreTrainedModel]
Tokens = Callable[..., Tensor]
CPU = torch.device("cpu")


@pytest.fixture(params=["one file", "shards"])
def saved(request: pytest.FixtureRequest, dense: PreTrainedModel, tmp_path: Path) -> Path:
    """Each variant on disk, in one file (float32) and in several (bfloat16)."""
    if request.param == "shards":
        dense.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    else:
        dense.save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) is (request.param == "shards")
    return tmp_path


def filled(model: PreTrainedModel) -> list[int]:
    """Numbers of the layers that have weights now; looks past what fills them."""
    layers = decoder_layers(model)._modules
    return [int(n) for n, layer in layers.items() if layer is not None and any(True for _ in layer.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_those_of_the_loaded_model(saved: Path, dtype: torch.dtype, tokens: Tokens) -> None:
    source = locate_dense(str(saved))
    text = {"a": tokens(3, 12, seed=1), "b": tokens(2, 7, seed=2)}
    full = load_weights(source, dtype=dtype, device=CPU)
    streamed = load_streamed(source, dtype=dtype, device=CPU)
    assert (streamed.dtype, streamed.device) == (dtype, CPU)
    expected, found = (collect_statistics(m, text, batch=2, inputs=8) for m in (full, streamed))
    for name in text:
        assert found[name].count == expected[name].count
        for field in ("mean", "squared_deviations", "second_moment", "inputs"):
            torch.testing.assert_close(getattr(found[name], field), getattr(expected[name], field))
        assert float(expected[name].mean.abs().sum()) > 0


def test_experts_and_logits_are_those_of_the_loaded_model(saved: Path, tokens: Tokens) -> None:
    source = locate_dense(str(saved))
    full = load_weights(source, dtype=torch.float32, device=CPU)
    streamed = load_streamed(source, dtype=torch.float32, device=CPU)
    groups = [tokens(4, 16, seed=1), tokens(4, 16, seed=2)]
    moe = MoEConfig(experts=2, refined=RefinedConfig(steps=5))
    layers = [list(build_layers(m, groups, PruningConfig(), moe, batch=2, seed=0)) for m in (full, streamed)]
    for expected, found in zip(*layers, strict=True):
        for name, tensor in expected.tensors().items():
            torch.testing.assert_close(found.tensors()[name], tensor)
    with torch.no_grad():
        torch.testing.assert_close(streamed(groups[0]).logits, full(groups[0]).logits)


def test_the_checkpoints_own_type(saved: Path) -> None:
    expected = torch.float32 if (saved / "model.safetensors").is_file() else torch.bfloat16
    assert load_streamed(locate_dense(str(saved)), dtype="auto", device=CPU).dtype == expected


def test_one_layer_is_in_memory_at_a_time(build: Build, tokens: Tokens, tmp_path: Path) -> None:
    build(num_hidden_layers=5).save_pretrained(tmp_path)
    model = load_streamed(locate_dense(str(tmp_path)), dtype=torch.float32, device=CPU)
    assert filled(model) == []
    assert sum(p.numel() for p in model.parameters()) == 32  # the last norm
    for number in (0, 3, 3, 1):
        assert ffn(model, number).up.shape == (48, 32)
        assert filled(model) == [number]
    seen = []
    hooks = [
        layer.register_forward_hook(lambda *_: seen.append(filled(model)))
        for layer in decoder_layers(model)._modules.values()
        if layer is not None
    ]
    collect_statistics(model, {"a": tokens(4, 8)}, batch=2)
    assert seen == [[n] for n in range(5) for _ in range(2)]
    for hook in hooks:
        hook.remove()
    assert filled(model) == [4]


def test_every_layer_is_read_once(
    build: Build, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(num_hidden_layers=3).save_pretrained(tmp_path)
    model = load_streamed(locate_dense(str(tmp_path)), dtype=torch.float32, device=CPU)
    read: list[str] = []
    original = Checkpoint.read

    def counted(self: Checkpoint, names: list[str], **settings: object) -> dict[str, Tensor]:
        read.extend(names)
        return original(self, names, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "read", counted)
    collect_statistics(model, {"a": tokens(4, 8), "b": tokens(4, 8)}, batch=1)
    assert len(read) == len(set(read)) == 3 * 9


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "model-0000.-of-0000.*cannot be read or is truncated"),
        ("shard gone", "are missing .*model-0000.-of-0000"),
        ("index is no JSON", r"model\.safetensors\.index\.json cannot be read"),
        ("tensor missing", r"1 tensors missing, 0 of another shape \(first: model\.layers\.1\.mlp\.up_proj"),
        ("tensor more", r"1 tensors that the model .* has no place for \(first: extra\.weight\)"),
        ("not in the index", r"1 tensors that the model .* has no place for \(first: extra\.weight\)"),
        ("int8", r"1 tensors have an element type .*up_proj\.weight, I8\)"),
        ("other shapes", r"0 tensors missing, 6 of another shape"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_computed(
    build: Build, tmp_path: Path, what: str, message: str
) -> None:
    build().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shard = tmp_path / listed["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    match what:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "shard gone":
            shard.unlink()
        case "index is no JSON":
            index.write_text("{")
        case "tensor missing":
            stored = load_file(shard)
            del stored["model.layers.1.mlp.up_proj.weight"]
            save_file(stored, shard)
            del listed["weight_map"]["model.layers.1.mlp.up_proj.weight"]
            index.write_text(json.dumps(listed))
        case "tensor more" | "not in the index":
            save_file(load_file(shard) | {"extra.weight": torch.zeros(2)}, shard)
            if what == "tensor more":
                listed["weight_map"]["extra.weight"] = shard.name
                index.write_text(json.dumps(listed))
        case "int8":
            name = "model.layers.1.mlp.up_proj.weight"
            stored = load_file(shard)
            save_file(stored | {name: stored[name].to(torch.int8)}, shard)
        case "other shapes":
            config = tmp_path / "config.json"
            config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 40'))
    with pytest.raises(UserError, match=message):
        load_streamed(locate_dense(str(tmp_path)), dtype=torch.float32, device=CPU)
