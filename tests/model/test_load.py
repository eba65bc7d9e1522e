"""Finding and loading dense models, and what is said when it fails."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import dive
from dive.errors import UserError
from dive.model.load import document_tokens, fingerprint_directory, locate_dense, resolve_device

Build = Callable[..., PreTrainedModel]


@pytest.fixture
def saved(build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    directory = tmp_path / "dense"
    build().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_every_family_is_loaded(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    dense.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = dive.load_dense(str(tmp_path), device="cpu")
    assert type(model) is type(dense)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected = dense.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert loaded("the mat")["input_ids"] == tokenizer("the mat")["input_ids"]


def test_the_asked_for_dtype(saved: Path) -> None:
    assert dive.load_dense(str(saved), dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert dive.load_dense(str(saved), dtype="auto")[0].dtype == torch.float32


def test_the_source_says_what_it_found(saved: Path) -> None:
    source = locate_dense(str(saved))
    assert source.channels == 48
    assert source.fingerprint == fingerprint_directory(saved)
    assert len(source.fingerprint) == 64


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_fingerprint_follows_the_files(saved: Path, file: str) -> None:
    before = fingerprint_directory(saved)
    (saved / "README.md").write_text("no part of the model")
    assert fingerprint_directory(saved) == before
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[:-1] + b" ")
    assert fingerprint_directory(saved) != before


def break_it(directory: Path, what: str) -> None:
    weights = directory / "model.safetensors"
    config = directory / "config.json"
    match what:
        case "no config":
            config.unlink()
        case "config is no JSON":
            config.write_text("{")
        case "unknown family":
            config.write_text(json.dumps({"model_type": "nothing_known"}))
        case "unsupported family":
            config.write_text(json.dumps({"model_type": "gpt2"}))
        case "no weights":
            weights.unlink()
        case "pickled":
            weights.rename(directory / "pytorch_model.bin")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "tensor missing":
            stored = load_file(weights)
            del stored["model.layers.1.mlp.up_proj.weight"]
            save_file(stored, weights, metadata={"format": "pt"})
        case "other shapes":
            config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 40'))
        case "no tokenizer":
            for file in directory.glob("tokenizer*"):
                file.unlink()
        case "small vocabulary":
            config.write_text(config.read_text().replace('"vocab_size": 320', '"vocab_size": 100'))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "no config.json in this directory"),
        ("config is no JSON", r"config\.json cannot be read"),
        ("unknown family", r"config\.json cannot be read \(.*nothing_known"),
        ("unsupported family", "model_type 'gpt2' is not supported"),
        ("no weights", r"no weights: a \*\.safetensors file is missing"),
        ("pickled", r"only pickled weights \(\.bin\)"),
        ("truncated", "the weights cannot be read"),
        ("tensor missing", r"1 tensors missing, 0 of another shape \(first: model\.layers\.1\.mlp\.up_proj"),
        ("other shapes", "of another shape|cannot be read"),
        ("no tokenizer", "no tokenizer there"),
        ("small vocabulary", "its tokenizer has token ids up to .*, its config.json vocab_size=100"),
    ],
)
def test_what_is_wrong_with_a_directory_is_said(saved: Path, what: str, message: str) -> None:
    break_it(saved, what)
    with pytest.raises(UserError, match=message) as caught:
        dive.load_dense(str(saved))
    assert str(caught.value).startswith(f"model.path={saved}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c"])
def test_no_such_directory(path: str) -> None:
    with pytest.raises(UserError, match=f"^model.path={path}: no such directory"):
        dive.load_dense(path)


def test_a_hub_model_that_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"fetch it with `hf download nobody/nothing --revision v1`"):
        dive.load_dense("nobody/nothing", revision="v1")


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match=r"^model\.device=nonsense is not to be had here"):
        resolve_device("nonsense")
    with pytest.raises(UserError, match=r"^model\.device=cuda:99"):
        resolve_device("cuda:99")


def test_document_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert document_tokens(tokenizer, "the cat") == [0, *plain]
    without_bos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    assert document_tokens(without_bos, "the cat") == [1, *plain]
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert document_tokens(bare, "the cat") == plain
    assert document_tokens(bare, "") == []
