"""Finding and loading dense models, and what is said when it fails."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import dive
from dive.errors import UserError
from dive.export import open_checkpoint
from dive.model.load import document_tokens, fingerprint_directory, load_weights, locate_dense, resolve_device
from dive.model.streamed import load_streamed

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
        case "large tokenizer":
            file = directory / "tokenizer.json"
            settings = json.loads(file.read_text())
            settings["model"]["vocab"]["zebra"] = 5000
            file.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "no config.json in this directory"),
        ("config is no JSON", r"config\.json cannot be read"),
        ("unknown family", "model_type 'nothing_known' is not supported"),
        ("unsupported family", "model_type 'gpt2' is not supported"),
        ("no weights", r"no weights: a \*\.safetensors file is missing"),
        ("pickled", r"only pickled weights \(\.bin\)"),
        ("truncated", "cannot be read or is truncated"),
        ("tensor missing", r"1 tensors missing, 0 of another shape \(first: model\.layers\.1\.mlp\.up_proj"),
        ("other shapes", "of another shape|cannot be read"),
        ("no tokenizer", "no tokenizer there"),
        ("large tokenizer", "its tokenizer has token ids up to 5000, its config.json vocab_size=320"),
    ],
)
def test_what_is_wrong_with_a_directory_is_said(saved: Path, what: str, message: str) -> None:
    break_it(saved, what)
    with pytest.raises(UserError, match=message) as caught:
        dive.load_dense(str(saved))
    assert str(caught.value).startswith(f"model.path={saved}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c", "~nobody-at-all/x"])
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

    for name in ("meta", "meta:0", "xla"):  # no data there
        with pytest.raises(
            UserError, match=f"^model\\.device={name} is not to be had here .*set model.device=cpu"
        ) as caught:
            resolve_device(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^device=meta .*set device=cpu"):
        resolve_device("meta", "device")


# ------------------------------------------------------------------------------------------- tensors that are ignored

CPU = torch.device("cpu")
Stored = dict[str, torch.Tensor]


def one_layer_more(stored: Stored) -> None:
    for name in [name for name in stored if name.startswith("model.layers.1.")]:
        stored[name.replace("layers.1.", "layers.2.")] = stored[name].clone()


def one_layer_less(stored: Stored) -> None:
    for name in [name for name in stored if name.startswith("model.layers.1.")]:
        del stored[name]


def another_tensor(stored: Stored) -> None:
    stored["score.weight"] = torch.zeros(2, 32)


def cast(dtype: torch.dtype) -> Callable[[Stored], None]:
    def change(stored: Stored) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        stored[name] = (stored[name] * 10).to(dtype)

    return change


def another_head(stored: Stored) -> None:
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1.0


IGNORED: dict[str, tuple[Callable[[Stored], None], str]] = {
    "layer more": (one_layer_more, r"config\.json has num_hidden_layers=2, the weights have 3 layers"),
    "layer less": (one_layer_less, r"config\.json has num_hidden_layers=2, the weights have 1 layers"),
    "another tensor": (another_tensor, r"1 tensors that the model .* has no place for \(first: score\.weight\)"),
    "int8": (cast(torch.int8), r"1 tensors have an element type .*layers\.1\.mlp\.up_proj\.weight, I8\); de-quantise"),
    "float8": (cast(torch.float8_e4m3fn), r"1 tensors have an element type .*F8_E4M3\); de-quantise"),
}


def change_weights(directory: Path, change: Callable[[Stored], None]) -> None:
    stored = load_file(directory / "model.safetensors")
    change(stored)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("fault", IGNORED)
def test_tensors_that_would_be_ignored_are_refused_before_they_are_read(saved: Path, fault: str) -> None:
    change, message = IGNORED[fault]
    change_weights(saved, change)
    with pytest.raises(UserError, match=rf"^model\.path={saved}: .*{message}"):
        locate_dense(str(saved))
    with pytest.raises(UserError, match=rf"^checkpoint={saved}: .*{message}"):
        open_checkpoint(str(saved), dtype="float32", device=CPU)


@pytest.mark.parametrize("fault", ["another tensor", "int8", "float8", "layer more"])
def test_so_are_those_of_a_model_from_the_hub(
    saved: Path, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its headers are at hand only when it is loaded."""
    from huggingface_hub import constants

    change_weights(saved, IGNORED[fault][0])
    cache, commit = tmp_path / "cache", "a" * 40
    shutil.copytree(saved, cache / "models--some--model/snapshots" / commit)
    (cache / "models--some--model/refs").mkdir()
    (cache / "models--some--model/refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    source = locate_dense("some/model")
    message = "has no place for" if fault == "layer more" else IGNORED[fault][1]
    for load in (load_weights, load_streamed):
        with pytest.raises(UserError, match=rf"^model\.path=some/model: .*{message}"):
            load(source, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("load", [load_weights, load_streamed])
def test_a_tied_head_and_old_frequencies_are_no_fault(build: Build, tmp_path: Path, load: Callable[..., Any]) -> None:
    model = build("llama-tied")
    model.save_pretrained(tmp_path)

    def add(stored: Stored) -> None:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        for layer in range(2):
            stored[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    change_weights(tmp_path, add)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        loaded = load(locate_dense(str(tmp_path)), dtype=torch.float32, device=CPU)
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("load", [load_weights, load_streamed])
def test_a_head_of_its_own_under_a_tied_configuration_is_refused(
    build: Build, tmp_path: Path, load: Callable[..., Any]
) -> None:
    build("llama-tied").save_pretrained(tmp_path)
    change_weights(tmp_path, another_head)
    with pytest.raises(UserError, match=r"the head differs from the embedding.* set it to false"):
        load(locate_dense(str(tmp_path)), dtype=torch.float32, device=CPU)


def test_the_same_weights_are_read_whole_and_streamed_where_an_index_was_left_behind(build: Build, saved: Path) -> None:
    stale = build(seed=1)
    stale.save_pretrained(saved / "stale", max_shard_size="20KB")
    for file in (saved / "stale").glob("model*"):
        file.rename(saved / file.name)
    shutil.rmtree(saved / "stale")
    ids = torch.arange(10)[None]
    source = locate_dense(str(saved))
    whole, streamed = (load(source, dtype=torch.float32, device=CPU) for load in (load_weights, load_streamed))
    with torch.no_grad():
        torch.testing.assert_close(streamed(ids).logits, whole(ids).logits)


# ------------------------------------------------------------------------------------------------- files of other kinds


@pytest.mark.parametrize("name", ["config.json", "extra.json", "model-2.safetensors", "tokenizer.json"])
def test_a_pipe_is_refused_and_not_waited_for(saved: Path, name: str) -> None:
    (saved / name).unlink(missing_ok=True)
    os.mkfifo(saved / name)
    message = "no config.json" if name == "config.json" else f"{name} cannot be read: it is not a regular file"
    with pytest.raises(UserError, match=message):
        locate_dense(str(saved))
    assert len(fingerprint_directory(saved)) == 64


@contextmanager
def shut(model: Path, mode: int) -> Iterator[Path]:
    """A copy of a model in a directory of this mode, for somebody who is not root."""
    place = Path(tempfile.mkdtemp())  # pytest's own directories are closed to others
    shutil.copytree(model, place / "model")
    place.chmod(0o755)
    (place / "model").chmod(mode)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield place / "model"
    finally:
        os.seteuid(before)
        (place / "model").chmod(0o755)
        shutil.rmtree(place)


@pytest.mark.parametrize("mode", [0o000, 0o311, 0o644])
def test_an_unreadable_root_is_named(saved: Path, mode: int) -> None:
    with shut(saved, mode) as directory, pytest.raises(UserError) as caught:
        locate_dense(str(directory))
    assert str(caught.value).startswith(f"model.path={directory} cannot be read (Permission denied); make it readable")


def test_document_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert document_tokens(tokenizer, "the cat") == [0, *plain]
    without_bos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    assert document_tokens(without_bos, "the cat") == [1, *plain]
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert document_tokens(bare, "the cat") == plain
    assert document_tokens(bare, "") == []


def test_the_chat_template_is_part_of_a_models_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    prints = [fingerprint_directory(tmp_path)]
    for template in ("{{ messages }}", "{{ messages[0] }}"):
        (tmp_path / "chat_template.jinja").write_text(template)
        prints.append(fingerprint_directory(tmp_path))
    assert len(set(prints)) == 3
