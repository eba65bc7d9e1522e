"""GGUF files in place of directories: written here by llama.cpp's own writer, and read back."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import dive
from dive.cli import composed
from dive.config import ModelConfig
from dive.errors import UserError
from dive.export import open_checkpoint
from dive.generate import GenerateConfig, generate
from dive.model.architecture import locate_architecture, read_architecture
from dive.model.gguf import ROPE_FREQUENCIES, read_gguf
from dive.model.load import DenseSource, in_safetensors, load_weights, locate_dense
from dive.model.streamed import load_streamed
from dive.plan.stages import plan
from dive.store import Store, WithStore
from tests.conftest import LLAMA3_ROPE, Build
from tests.workplace import Workplace, environment

CPU = torch.device("cpu")
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def write_gguf(
    file: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    change: Change = lambda metadata, tensors: None,
) -> Path:
    """The model as llama.cpp's converter writes it, matrices of one type.

    Args:
        change: takes what is written, metadata without the architecture's prefix, and may alter it.
    """
    config = model.config
    architecture = "qwen3" if config.model_type == "qwen3" else "llama"
    metadata: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    tensors = {}
    for name, parameter in model.named_parameters():
        *block, part = name.removesuffix(".weight").removeprefix("model.layers.").split(".", 1)
        known = NAMES[part if block and block[0].isdigit() else name.removesuffix(".weight")]
        values = parameter.detach().numpy()
        if architecture == "llama" and known in ("attn_q", "attn_k"):  # as llama.cpp's `permute` does
            heads = len(values) // config.head_dim
            values = values.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(values.shape)
        tensors[f"blk.{block[0]}.{known}.weight" if known.startswith(("attn", "ffn")) else f"{known}.weight"] = values
    change(metadata, tensors)
    writer = gguf.GGUFWriter(file, metadata.pop("architecture", architecture))
    for key, value in metadata.items():
        name = key if key.startswith("split.") else f"{writer.arch}.{key}"
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(name, value)
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(core["vocab"], key=core["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in ("<s>", "</s>") else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in core["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, values in tensors.items():
        own = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def dequantised(file: Path, root: Path, dtype: str = "float32") -> DenseSource:
    return in_safetensors(locate_dense(str(file), dtype=dtype), WithStore(Store(root / "store")))


def stored(directory: str | Path) -> dict[str, Tensor]:
    """Tensors of a directory."""
    return {k: v for file in Path(directory).glob("*.safetensors") for k, v in load_file(file).items()}


def test_every_family_comes_back(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tokens: Callable[..., Tensor]
) -> None:
    if dense.config.model_type == "qwen2":
        pytest.skip("not read from GGUF files")
    file = write_gguf(tmp_path / "dense.gguf", dense, tokenizer)
    model, loaded = dive.load_dense(str(file), device="cpu", store=str(tmp_path / "store"))
    expected = dense.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == expected.keys()
    text = "the cat sat: 12 + 30 <s>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]  # numbers are whole, which Qwen's own class splits
    assert (loaded.bos_token_id, loaded.eos_token_id) == (0, 1)
    if dense.config.rope_parameters["rope_type"] == "default" and dense.config.model_type != "mistral":
        assert torch.equal(model(tokens(1, 20)).logits, dense(tokens(1, 20)).logits)


def test_rope_scaling_of_llama_3_is_found_in_its_frequencies(
    build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tokens: Callable[..., Tensor]
) -> None:
    rope = {**LLAMA3_ROPE, "factor": 32.0, "original_max_position_embeddings": 8192}
    model = build("llama-tied", rope_parameters=rope)

    def frequencies(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
        tensors[ROPE_FREQUENCIES] = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)

    file = write_gguf(tmp_path / "scaled.gguf", model, tokenizer, change=frequencies)
    read, _ = dive.load_dense(str(file), device="cpu", store=str(tmp_path / "store"))
    assert read.config.rope_parameters == pytest.approx(rope)
    assert not torch.equal(read(tokens(1, 60)).logits, build("llama-tied", rope_parameters=None)(tokens(1, 60)).logits)
    torch.testing.assert_close(read(tokens(1, 60)).logits, model(tokens(1, 60)).logits)

    def others(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors[ROPE_FREQUENCIES] = np.linspace(1, 4, 8, dtype=np.float32)

    file = write_gguf(tmp_path / "others.gguf", model, tokenizer, change=others)
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not the RoPE scaling of Llama 3"):
        locate_dense(str(file))


@pytest.mark.parametrize("variant", ["llama", "qwen3-tied"])
@pytest.mark.parametrize(
    ("kind", "precision"),
    [("Q8_0", "Q8_0, 8.50 bits a weight"), ("Q4_1", "Q4_1, 5.00 bits a weight"), ("BF16", "BF16, 16.00 bits a weight")],
)
def test_weights_are_those_that_transformers_dequantises(
    variant: str, kind: str, precision: str, build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build(variant, hidden_size=128, intermediate_size=64, head_dim=128)  # transformers takes 128 of any Qwen3
    file = write_gguf(tmp_path / "small.gguf", model, tokenizer, gguf.GGMLQuantizationType[kind])
    source = dequantised(file, tmp_path)
    assert source.gguf is not None
    assert source.gguf.precision == precision
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    found = stored(source.path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert expected.keys() - found.keys() <= {"lm_head.weight"}
    own = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], own)
    torch.testing.assert_close(found["model.layers.0.mlp.up_proj.weight"], own, atol=0.06, rtol=0.01)


def test_it_is_dequantised_once_for_each_element_type(
    build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "half.gguf", build(), tokenizer, gguf.GGMLQuantizationType.F16)
    first, again = dequantised(file, tmp_path), dequantised(file, tmp_path)
    auto, exact = dequantised(file, tmp_path, "auto"), stored(first.path)
    assert first.path == again.path
    assert first.fingerprint == auto.fingerprint
    assert all(tensor.dtype == torch.float16 for tensor in stored(auto.path).values())
    assert all(torch.equal(tensor, exact[name].half()) for name, tensor in stored(auto.path).items())
    assert load_weights(auto, dtype="auto", device=CPU).dtype == torch.float16
    assert len(list((tmp_path / "store" / "dequantised").iterdir())) == 2
    streamed = load_streamed(first, dtype=torch.float32, device=CPU)
    assert torch.equal(streamed.model.layers[1].mlp.up_proj.weight, exact["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.slow
def test_a_run_is_the_one_from_the_directory(
    untrained: Workplace, tokenizer: PreTrainedTokenizerFast, build: Build, tmp_path: Path
) -> None:
    """And its plan, results, model card, evaluation and text."""
    model = build(intermediate_size=64)
    file = write_gguf(tmp_path / "dense.gguf", model, tokenizer, gguf.GGMLQuantizationType.Q8_0)
    untrained.settings.append("retrain=none")
    untrained.root = tmp_path
    source = dequantised(file, tmp_path)
    directory = shutil.copytree(source.path, tmp_path / "directory", ignore=shutil.ignore_patterns("manifest.json"))
    results = untrained.run("from_file", f"model.path={file}", f"store={tmp_path / 'one'}")
    other = untrained.run("from_directory", f"model.path={directory}", f"store={tmp_path / 'two'}")
    first, second = stored(tmp_path / "from_file/checkpoint"), stored(tmp_path / "from_directory/checkpoint")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert [s["perplexity"] for s in results["stages"]] == [s["perplexity"] for s in other["stages"]]

    assert results["run"]["precision"] == "Q8_0, 8.50 bits a weight"
    assert "precision" not in other["run"]
    assert "de-quantised from a GGUF file (Q8_0, 8.50 bits a weight)" in (
        tmp_path / "from_file/checkpoint/README.md"
    ).read_text(encoding="utf-8")
    assert any(artifact.startswith("dequantised/") for artifact in results["run"]["artifacts"])
    spent = {stage["name"]: stage for stage in results["plan"]["actual"]["stages"]}
    planned = {stage["name"]: stage for stage in results["plan"]["planned"]["stages"]}
    assert planned["dequantised"]["disk_bytes"] == 4 * sum(p.numel() for p in model.parameters())
    assert spent["dequantised"]["disk_bytes"] > planned["dequantised"]["disk_bytes"]
    assert "dequantised" not in {stage["name"] for stage in other["plan"]["planned"]["stages"]}


def test_a_file_is_measured_and_continued_like_a_directory(
    build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "dense.gguf", build(), tokenizer)
    opened = open_checkpoint(str(file), dtype="float32", device=CPU).in_safetensors(WithStore(Store(tmp_path / "s")))
    assert torch.equal(opened.load().lm_head.weight, build().lm_head.weight)
    asked = GenerateConfig(
        checkpoint=str(file), prompt="the cat", max_new_tokens=5, store=str(tmp_path / "s"), temperature=0
    )
    generate(asked)
    from_file = capsys.readouterr().out
    build().save_pretrained(tmp_path / "directory")
    tokenizer.save_pretrained(tmp_path / "directory")
    generate(replace(asked, checkpoint=str(tmp_path / "directory")))
    assert from_file == capsys.readouterr().out
    assert from_file.startswith("the cat")


def test_it_is_planned_without_torch(build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build("qwen3")
    file = write_gguf(tmp_path / "dense.gguf", model, tokenizer)
    found = locate_architecture(ModelConfig(name="here", path=str(file)))
    assert found == replace(read_architecture(model.config.to_dict()), dtype="float32")
    planned = plan(composed(["model=local", f"model.path={file}"]), found)
    assert planned.stages[0].name == "dequantised"
    code = (
        "import sys; from dive.model.architecture import read_settings; from pathlib import Path; "
        f"read_settings(Path({str(file)!r}), ''); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_it_is_parsed_once(
    build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "dense.gguf", build(), tokenizer)
    opened: list[Path] = []
    reader = gguf.GGUFReader

    def counting(path: Path) -> gguf.GGUFReader:
        opened.append(path)
        return reader(path)

    monkeypatch.setattr(gguf, "GGUFReader", counting)
    for _ in range(2):  # sizes in the configuration ask, and the plan
        composed(["model=local", f"model.path={file}"])
    assert opened == [file]
    write_gguf(file, build(num_hidden_layers=1), tokenizer)  # another file of this name
    assert read_gguf(file, "").settings["num_hidden_layers"] == 1


def altered(**metadata: Any) -> Change:
    def change(found: dict[str, Any], _: dict[str, np.ndarray]) -> None:
        found.update({name.replace("__", "."): value for name, value in metadata.items()})

    return change


def with_bias(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.attn_q.bias"] = np.zeros(32, dtype=np.float32)


def without_up(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    del tensors["blk.1.ffn_up.weight"]


def without_layers(found: dict[str, Any], _: dict[str, np.ndarray]) -> None:
    del found["block_count"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            altered(architecture="gemma3"),
            "architecture 'gemma3' is not read from GGUF files; choose one of llama, qwen3",
        ),
        (altered(split__count=2), "one of 2 parts of a model; join them by `gguf-split --merge"),
        (altered(rope__scaling__type="yarn"), "RoPE scaling 'yarn' is not read"),
        (altered(expert_count=8), r"llama\.expert_count \(8\) is not read"),
        (altered(attention__sliding_window=16), r"llama\.attention\.sliding_window \(16\) is not read"),
        (altered(feed_forward_length=40), r"0 tensors missing, 6 of another shape \(first: model\.layers\.0\.mlp"),
        (altered(block_count=1), r"9 tensors have no place in a llama model \(first: blk\.1\.attn_k\.weight\)"),
        (altered(rope__dimension_count=4), "RoPE on 4 of 8 channels of a head is not read"),
        (without_layers, "its metadata says nothing of num_hidden_layers"),
        (with_bias, r"1 tensors have no place in a llama model \(first: blk\.0\.attn_q\.bias\)"),
        (without_up, r"1 tensors missing, 0 of another shape \(first: model\.layers\.1\.mlp\.up_proj\.weight\)"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    change: Change, message: str, build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "dense.gguf", build(), tokenizer, change=change)
    with pytest.raises(UserError, match=rf"^model\.path={file}: {message}"):
        locate_dense(str(file))


def test_what_is_no_whole_file_is_said(build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "dense.gguf", build(), tokenizer)
    content = file.read_bytes()
    for broken in (b"", b"GGUF", b"PK" + content[2:], content[: len(content) // 3], content[:-100]):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="no GGUF file, or a truncated one"):
            locate_dense(str(file))
    with pytest.raises(UserError, match="no such file"):
        locate_dense(str(tmp_path / "other.gguf"))
    with pytest.raises(UserError, match=rf"no config\.json in this directory; one of .* by model\.path={file}"):
        locate_dense(str(tmp_path))
    build().config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"file is missing; one of the GGUF files there .* by model\.path={file}"):
        locate_dense(str(tmp_path))


def test_a_missing_reader_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "dense.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"pip install 'dive-moe\[gguf\]'"):
        locate_dense(str(tmp_path / "dense.gguf"))
