"""Whatever stands in a model's JSON files: it loads and computes, or one line says what is wrong. Never another exception."""

import copy
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dive.api import reconstruct
from dive.config import ModelConfig
from dive.errors import UserError
from dive.export import load_with_expert_bias, open_checkpoint, save_with_expert_bias
from dive.model.architecture import locate_architecture
from dive.model.load import load_dense, load_tokenizer, load_weights, locate_dense
from dive.pruning.calibrate import collect_statistics

Build = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def whole(build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that nothing is wrong with."""
    directory = tmp_path_factory.mktemp("fuzz") / "model"
    build("llama-tied", head_dim=8).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def as_dense(directory: Path) -> PreTrainedModel:
    """Load it as ``dive.train`` does, a step after another, and plan with it as ``dive.plan`` does."""
    locate_architecture(ModelConfig(name="x", path=str(directory)))
    source = locate_dense(str(directory))
    load_tokenizer(source)
    return load_weights(source, dtype=torch.float32, device=CPU)


def as_checkpoint(directory: Path) -> PreTrainedModel:
    """Load it as ``dive.evaluate`` does."""
    model = open_checkpoint(str(directory), dtype="float32", device=CPU)
    load_tokenizer(model.source)
    return model.load()


LOADERS: dict[str, Callable[[Path], PreTrainedModel]] = {"model.path": as_dense, "checkpoint": as_checkpoint}


def refusal(directory: Path, where: str) -> str | None:
    """What is said against a directory; none where it loads, and then its logits are numbers."""
    try:
        model = LOADERS[where](directory)
    except UserError as error:
        message = str(error)
        assert message.startswith(f"{where}={directory}")
        assert len(message.splitlines()) == 1
        return message
    with torch.no_grad():
        assert bool(model(input_ids=torch.arange(10)[None]).logits.isfinite().all())
    return None


def test_the_directory_itself_is_whole(whole: Path) -> None:
    assert [refusal(whole, where) for where in LOADERS] == [None, None]


# ------------------------------------------------------------------------------------------------------------- known cases

NESTED = "[" * 1000 + "]" * 1000

CONFIGS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "hidden_size abc": ({"hidden_size": "abc"}, "hidden_size in config.json is 'abc', not a whole number"),
    "hidden_size 63": ({"hidden_size": 63}, r"hidden_size in config.json is 63, not a multiple of num_attention_heads"),
    "hidden_size null": ({"hidden_size": None}, "hidden_size in config.json is None, not a whole number"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers in config.json is 0, not a whole number of at least 1"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers in config.json is 1000000000, not at most"),
    "a billion labels": ({"num_labels": 10**9}, "num_labels in config.json is 1000000000, not at most"),
    "layers of their own": ({"per_layer_config": {"0": {"head_dim": 4}}}, "layers of several shapes are not supported"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads in config.json is 0"),
    "no key heads": ({"num_key_value_heads": 0}, "num_key_value_heads in config.json is 0"),
    "three key heads": ({"num_key_value_heads": 3}, r"num_key_value_heads in config.json is 3, not a divisor"),
    "head_dim 7": ({"head_dim": 7}, "head_dim in config.json is 7, not of an even number"),
    "rope_scaling list": ({"rope_scaling": [1, 2]}, "config.json cannot be read"),
    "rope_parameters list": ({"rope_parameters": [1, 2]}, "config.json cannot be read"),
    "unknown rope_type": (
        {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}},
        "config.json describes no model",
    ),
    "negative rope_theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope settings"),
    "rotary factor": ({"partial_rotary_factor": 1e12}, r"partial_rotary_factor is not in \(0, 1\]"),
    "unknown hidden_act": ({"hidden_act": "nope"}, r"config.json describes no model that can be built \(.*nope"),
    "hidden_act of no name": ({"hidden_act": 3}, "config.json cannot be read"),
    "unknown dtype": ({"dtype": "nope"}, "dtype in config.json is 'nope', not one of float32"),
    "dtype int8": ({"dtype": "int8"}, "dtype in config.json is 'int8', not one of float32"),
    "dtype list": ({"torch_dtype": [1]}, r"torch_dtype in config.json is \[1\], not one of float32"),
    "model_type list": ({"model_type": ["llama"]}, "model_type|config.json cannot be read"),
    "model_type null": ({"model_type": None}, "model_type|config.json cannot be read"),
    "norm's epsilon": ({"rms_norm_eps": "abc"}, "rms_norm_eps in config.json is 'abc', not a number in"),
    "tied by name": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings in config.json is 'yes', not true or false"),
    "quantised": (
        {"quantization_config": {"quant_method": "fp8"}},
        "quantised weights .* are not read; de-quantise them first",
    ),
    "null": ("null", "config.json cannot be read .*NoneType"),
    "a number": ("3", "config.json cannot be read .*int"),
    "a list": ("[]", "config.json cannot be read .*list"),
    "nested": (NESTED, "config.json cannot be read"),
    "empty": ("", "config.json cannot be read"),
}


@pytest.mark.parametrize("where", LOADERS)
@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_json_that_no_model_has_is_refused(whole: Path, tmp_path: Path, case: str, where: str) -> None:
    changes, message = CONFIGS[case]
    directory = tmp_path / "model"
    shutil.copytree(whole, directory)
    file = directory / "config.json"
    content = changes if isinstance(changes, str) else json.dumps(json.loads(file.read_text()) | changes)
    file.write_text(content)
    said = refusal(directory, where)
    assert said is not None
    assert re.search(message, said), said
    with pytest.raises(UserError):  # before a text is read
        locate_dense(str(directory))


TOKENIZERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "null": lambda _: None,
    "a number": lambda _: 3,
    "a list": lambda _: [],
    "no model": lambda t: {k: v for k, v in t.items() if k != "model"},
    "another version": lambda t: t | {"version": "9.9"},
    "added tokens of no type": lambda t: t | {"added_tokens": 3},
    "a vocabulary of names": lambda t: t | {"model": t["model"] | {"vocab": {"a": "b"}}},
    "no vocabulary": lambda t: t | {"model": t["model"] | {"vocab": {}, "merges": []}, "added_tokens": []},
    "merges of no tokens": lambda t: t | {"model": t["model"] | {"merges": [["zz", "yy"]]}},
    "an unknown splitter": lambda t: t | {"pre_tokenizer": {"type": "Nope"}},
}


@pytest.mark.parametrize("where", LOADERS)
@pytest.mark.parametrize("case", [*TOKENIZERS, "nested", "empty", "cut short", "no text"])
def test_a_tokenizer_json_that_makes_none_is_refused(whole: Path, tmp_path: Path, case: str, where: str) -> None:
    directory = tmp_path / "model"
    shutil.copytree(whole, directory)
    file = directory / "tokenizer.json"
    data = file.read_bytes()
    if case in TOKENIZERS:
        file.write_text(json.dumps(TOKENIZERS[case](json.loads(data))))
    else:
        file.write_bytes(
            {"nested": NESTED.encode(), "empty": b"", "cut short": data[:1000], "no text": b"\xff\x00"}[case]
        )
    said = refusal(directory, where)
    assert said is not None
    assert "tokenizer" in said


@pytest.fixture(scope="module")
def biased(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of :func:`save_with_expert_bias` that nothing is wrong with."""
    dense, tokenizer = load_dense(str(whole), device="cpu")
    tokens = [torch.arange(64).reshape(4, 16), torch.arange(64, 128).reshape(4, 16)]
    statistics = [collect_statistics(dense, {"a": group}, batch=2)["a"] for group in tokens]
    moe = reconstruct(dense, statistics, ratio=0.5, compensation="bias")
    return save_with_expert_bias(moe, tokenizer, tmp_path_factory.mktemp("biased") / "moe_with_expert_bias")


BIASED: dict[str, tuple[dict[str, Any] | str, str]] = {
    "null": ("null", "config.json cannot be read"),
    "nested": (NESTED, "config.json cannot be read"),
    "no stock class": ({"stock_model_type": ["mixtral"]}, "stock_model_type in config.json is not one of mixtral"),
    "hidden_size abc": ({"hidden_size": "abc"}, "hidden_size in config.json is 'abc'"),
    "hidden_act of no name": ({"hidden_act": 3}, "config.json cannot be read"),
    "another hidden_act": ({"hidden_act": "nope"}, "the weights are not those of its config.json"),
    "another width": ({"intermediate_size": 8}, "the weights are not those of its config.json"),
    "a layer more": ({"num_hidden_layers": 3}, "lacks the experts' biases"),
}


@pytest.mark.parametrize("case", BIASED)
def test_a_directory_with_expert_biases_is_checked_as_well(biased: Path, tmp_path: Path, case: str) -> None:
    assert refusal(biased, "checkpoint") is None
    changes, message = BIASED[case]
    directory = tmp_path / "moe_with_expert_bias"
    shutil.copytree(biased, directory)
    file = directory / "config.json"
    file.write_text(changes if isinstance(changes, str) else json.dumps(json.loads(file.read_text()) | changes))
    said = refusal(directory, "checkpoint")
    assert said is not None
    assert re.search(message, said), said
    with pytest.raises(UserError, match=re.escape(str(directory))):
        load_with_expert_bias(directory)


# -------------------------------------------------------------------------------------------------------------------- fuzz

NAMES = (
    *(
        "rope_scaling",
        "rope_theta",
        "rope_parameters",
        "quantization_config",
        "head_dim",
        "layer_types",
        "sliding_window",
    ),
    *("auto_map", "architectures", "torch_dtype", "dtype", "per_layer_config", "num_labels", "id2label", "hidden_act"),
    *("partial_rotary_factor", "_attn_implementation", "attention_bias", "mlp_bias", "pad_token_id", "text_config"),
    *(
        "tokenizer_class",
        "added_tokens_decoder",
        "chat_template",
        "normalizer",
        "post_processor",
        "truncation",
        "padding",
    ),
)
VALUES = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            "",
            "abc",
            "gelu",
            "int8",
            "float8_e4m3fn",
            "gpt2",
            "mixtral",
            "qwen3",
            "\x00",
            "[UNK]",
            "yarn",
        ]
    ),
    st.sampled_from([0, 1, -1, 2, 7, 63, 10**6, 10**12, 2**31, 2**70, -(2**70)]),
    st.sampled_from([0.5, -0.5, 1e308, 1e-308, math.nan, math.inf, -math.inf]),
    st.sampled_from(
        [[], {}, [1, 2], [None], [[[[]]]], {"a": 1}, {"rope_type": "nope"}, {"rope_type": "linear"}, ["llama"]]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ),
)


def somewhere(data: st.DataObject, tree: Any) -> tuple[Any, Any]:
    """(a container of the tree, a key or index in it), at any depth; top-level keys are likeliest."""
    holder, key = tree, data.draw(st.sampled_from(sorted(tree)))
    while isinstance(holder[key], dict | list) and holder[key] and data.draw(st.integers(0, 3)):
        holder = holder[key]
        key = data.draw(
            st.sampled_from(sorted(holder)) if isinstance(holder, dict) else st.integers(0, len(holder) - 1)
        )
    return holder, key


def broken(data: st.DataObject, content: bytes) -> bytes:
    """The content of a JSON file with one to three faults, or with its bytes damaged."""
    kind = data.draw(st.sampled_from(["tree", "tree", "tree", "tree", "cut", "bytes", "noise"]))
    if kind == "cut":
        return content[: data.draw(st.integers(0, len(content) - 1))]
    if kind == "bytes":
        damaged = bytearray(content)
        for _ in range(data.draw(st.integers(1, 8))):
            damaged[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        return bytes(damaged)
    if kind == "noise":
        return data.draw(
            st.sampled_from([b"null", b"3", b'"x"', b"[]", b"{}", NESTED.encode()]) | st.binary(max_size=40)
        )
    tree = json.loads(content)
    for _ in range(data.draw(st.integers(1, 3))):
        if not tree:
            break
        holder, key = somewhere(data, tree)
        match data.draw(st.sampled_from(["replace", "replace", "delete", "add"])):
            case "replace":
                holder[key] = copy.deepcopy(data.draw(VALUES))
            case "delete":
                del holder[key]
            case "add":
                tree[data.draw(st.sampled_from(NAMES) | st.text(max_size=10))] = copy.deepcopy(data.draw(VALUES))
    return json.dumps(tree).encode()


@pytest.mark.slow
@pytest.mark.parametrize("where", LOADERS)
@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_ends_in_one_line_or_in_a_model(whole: Path, where: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "model"
        shutil.copytree(whole, directory)
        (directory / name).write_bytes(broken(data, (directory / name).read_bytes()))
        refusal(directory, where)
