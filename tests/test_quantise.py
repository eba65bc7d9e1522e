"""``python -m dive.quantise``: what it refuses at once, and what real tools write, where ``DIVE_ENGINES`` names them."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from dive.engines.quantised import FILE, Quantised, read_quantised
from dive.engines.texts import calibration
from dive.errors import UserError
from dive.model.load import load_tokenizer, locate_dense
from dive.quantise import QuantiseConfig, SchemeName, check_reached, quantise
from dive.report.card import published_variant, quantised_card
from tests.engines.exports import make
from tests.engines.test_engines import lacking, place, python

CARD = (
    "---\nbase_model: o/base\nbase_model_relation: finetune\ntags: [dive]\nlibrary_name: transformers\nmodel-index:\n"
    "- name: m\n  results:\n  - task: {type: text-generation}\n    dataset: {type: t, name: t}\n"
    "    metrics: [{type: perplexity, value: 3.0}]\n---\n\n# A model\n\n## Configuration\n\n```json\n{}\n```\n"
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make("mixtral, tied head", tmp_path_factory.mktemp("quantise") / "checkpoint")
    (directory / "README.md").write_text(CARD)
    return directory


@pytest.fixture
def export(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def configured(export: Path, scheme: str = "w4a16", **settings: Any) -> QuantiseConfig:
    small = {"calibration_tokens": 4096, "length": 128, "tokens": 1024, "least_tokens": 32}
    return QuantiseConfig(**({"checkpoint": str(export), "scheme": SchemeName[scheme]} | small | settings))


def made(**parts: Any) -> Quantised:
    known = {
        "checkpoint": "/m/checkpoint",
        "model": "MixtralForCausalLM",
        "scheme": "w4a16",
        "stored": "4 bits, by {group}",
    }
    figures = {"bytes_before": 8 * 10**6, "bytes_after": 2 * 10**6, "perplexity_before": 9.5, "perplexity_after": 9.75}
    said = {"texts": "test texts", "predicted": 1000, "measured_in": "transformers 5.17.0", "date": "2026-12-01"}
    return Quantised(**(known | figures | said | {"tool": "llm_compressor", "version": "0.14", "group": 64} | parts))


# ------------------------------------------------------------------------------------------------------------ refusals


def change(directory: Path, **settings: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))


def test_a_directory_that_is_no_export_is_refused(export: Path) -> None:
    with pytest.raises(UserError, match=r"^checkpoint=embedded: no directory of an export"):
        quantise(configured(Path("embedded")))
    change(export, quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(UserError, match=r"quantised weights \(quantization_config in config\.json\) are not read"):
        quantise(configured(export))


def test_what_is_there_already_is_not_written_over(export: Path) -> None:
    (export.parent / "checkpoint-fp8").mkdir()
    with pytest.raises(UserError, match=r"checkpoint-fp8 is there already; set output=DIR, or remove it"):
        quantise(configured(export, "fp8"))


def test_a_shape_without_a_kernel_is_refused_before_the_tool_is_looked_for(export: Path) -> None:
    change(export, intermediate_size=100)
    with pytest.raises(
        UserError, match=r"run again with pruning\.width_multiple=64, or write it all the same with any_shape=true"
    ):
        quantise(configured(export))


@pytest.mark.skipif(importlib.util.find_spec("llmcompressor") is not None, reason="llm-compressor is installed")
def test_a_tool_that_is_not_there_is_named(export: Path) -> None:
    with pytest.raises(UserError, match=r"^scheme=fp8 needs llm-compressor: pip install 'dive-moe\[quantise\]'"):
        quantise(configured(export, "fp8"))
    with pytest.raises(UserError, match=r"^python=/no/python: no such interpreter"):
        quantise(configured(export, "fp8", python="/no/python"))


def test_what_llama_cpp_answers_otherwise_is_refused(export: Path) -> None:
    directory = make("qwen2_moe from Qwen2", export.parent / "other")
    (directory / "README.md").write_text(CARD)
    with pytest.raises(UserError, match=r"^scheme=q8_0: llama\.cpp .* Choose another scheme, or another model\.twin$"):
        quantise(configured(directory, "q8_0"))


def test_an_expert_that_few_tokens_reach_is_refused() -> None:
    found = made(reached={"model.layers.0.mlp.experts": [900, 40], "model.layers.1.mlp.experts": [500, 440]})
    check_reached(configured(Path("x"), least_tokens=40), found)
    check_reached(configured(Path("x"), least_tokens=41, every_expert=True), found)
    message = (
        r"^40 calibration tokens reached expert 1 of model\.layers\.0\.mlp\.experts, and least_tokens is 100; set "
    )
    with pytest.raises(UserError, match=message + r"calibration_tokens=12288,"):  # 4096 three times
        check_reached(configured(Path("x"), least_tokens=100), found)


def test_more_tokens_are_no_remedy_for_an_expert_that_gets_none() -> None:
    found = made(reached={"model.layers.0.mlp.experts": [940, 0]})
    with pytest.raises(
        UserError, match=r"^0 calibration tokens .* is 32; set every_expert=true, or a lower least_tokens$"
    ):
        check_reached(configured(Path("x")), found)


def test_calibration_is_on_training_texts_of_every_domain(export: Path) -> None:
    tokenizer = load_tokenizer(locate_dense(str(export), None, dtype="float32", where="checkpoint", any_family=True))
    rows = calibration(export, tokenizer, tokens=2048, length=64)
    assert len(rows) == 32
    assert {len(row) for row in rows} == {64}
    assert len({tuple(row) for row in rows}) == 32


# ---------------------------------------------------------------------------------------------------------------- card


def test_the_card_says_how_and_what_it_costs() -> None:
    found = made(reached={"0": [500, 440]}, calibration_tokens=940, trouble="RuntimeError: <b>")
    card = quantised_card(ModelCard(CARD), found)
    assert card.data.to_dict() == {
        "base_model": "o/base",
        "base_model_relation": "quantized",
        "tags": ["dive", "w4a16", "compressed-tensors"],
        "library_name": "transformers",
    }
    section = card.text.split("## Quantised\n")[1].split("## Configuration")[0]
    assert "4 bits, by 64. Head, routers and norms are as they were. By llm-compressor 0.14, 2026-12-01." in section
    assert "| weights | 8 MB | 2 MB |" in section
    assert "| perplexity, 1,000 tokens of test texts | 9.5000 | 9.7500 |" in section
    assert "Calibrated on 940 tokens of training texts; the least used expert saw 440." in section
    assert "<b>" not in section


def test_a_variant_is_published_with_how_it_is_served() -> None:
    card = quantised_card(ModelCard(CARD), made())
    text = published_variant(card, made(), "me/moe-w4a16", base="me/moe").text
    assert "vllm serve me/moe-w4a16\n" in text
    assert "llama" not in text
    gguf = made(tool="llama_cpp", scheme="q4_k_m")
    published = published_variant(quantised_card(ModelCard(CARD), gguf), gguf, "me/moe-q4_k_m", base="me/moe")
    assert "llama-server -m moe-q4_k_m/model-q4_k_m.gguf\n" in published.text
    assert "vllm" not in published.text
    data = published.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == ("me/moe", "quantized", "gguf")


# ---------------------------------------------------------------------------------------------------- with real tools


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp8", "int8", "w8a16", "w4a16"])
def test_llm_compressor_writes_what_is_read_again(
    scheme: str, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interpreter = python("llm_compressor")
    if interpreter is None:
        pytest.skip("no llm_compressor: tests/engines/install DIR, and DIVE_ENGINES=DIR")
    quantise(configured(export, scheme, python=interpreter))
    output = export.parent / f"checkpoint-{scheme}"
    found = read_quantised(output / FILE)
    assert found.perplexity_after == pytest.approx(found.perplexity_before, rel=0.02)
    assert found.bytes_after < found.bytes_before
    assert f"perplexity  {found.perplexity_before:.4f} -> {found.perplexity_after:.4f}" in capsys.readouterr().out
    assert "## Quantised" in (output / "README.md").read_text()
    if scheme == "int8":  # as docs/serving.md says
        assert found.trouble is not None
    else:
        assert found.trouble is None
        _, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
        assert not any(report.values())
    if scheme == "w4a16":
        assert [sum(counts) for counts in found.reached.values()] == [4096, 4096]
    assert not list(export.parent.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["q8_0", "q4_k_m"])
def test_llama_cpp_writes_one_file(scheme: str, export: Path) -> None:
    reason = lacking("llama_cpp")
    if reason is not None:
        pytest.skip(reason)
    interpreter = python("llama_cpp") or sys.executable
    quantise(configured(export, scheme, python=interpreter, llama_cpp=str(place() / "llama.cpp"), any_shape=True))
    output = export.parent / f"checkpoint-{scheme}"
    found = read_quantised(output / FILE)
    assert sorted(file.name for file in output.iterdir()) == ["README.md", f"model-{scheme}.gguf", FILE]
    assert found.perplexity_after == pytest.approx(found.perplexity_before, rel=0.02)
    assert re.fullmatch(r"llama\.cpp \d.*", found.measured_in)
