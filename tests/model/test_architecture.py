"""Figures of a model without its weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from dive.cli import CONF, composed
from dive.config import ArchitectureConfig, Config, ModelConfig
from dive.errors import UserError
from dive.model.architecture import EMBEDDED, check_architecture, locate_architecture, read_architecture
from dive.plan.parameters import shapes
from tests.workplace import environment


def typed(*overrides: str) -> Config:
    return composed(overrides)


def with_toy_texts(*overrides: str) -> Config:
    """The embedded model's budget and texts for any model, but where an override chooses others: figures by hand stay small."""
    chosen = {override.partition("=")[0] for override in overrides}
    toy = {"budget": "toy", "calibration_domains": "embedded", "eval": "default"}
    return composed([*(f"{group}={name}" for group, name in toy.items() if group not in chosen), *overrides])


# As the publishers and transformers count them.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama": 1_100_048_384,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3.2-1b": 1_235_814_400,
    "llama3.1-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


def test_every_hub_preset_is_in_the_list() -> None:
    presets = {file.stem for file in (CONF / "model").glob("*.yaml")}
    assert presets - {"tiny", "local"} == set(PUBLISHED)


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    config = typed(f"model={name}")
    assert config.model.architecture is not None
    assert shapes(config.model.architecture, config).dense == parameters
    assert config.model.architecture.weights == pytest.approx(parameters, rel=1e-3)  # norms apart


def test_a_models_own_configuration(dense: PreTrainedModel, tmp_path: Path) -> None:
    dense.config.save_pretrained(tmp_path)
    found = locate_architecture(ModelConfig(name="here", path=str(tmp_path)))
    assert found == read_architecture(dense.config.to_dict())
    assert (found.hidden_size, found.intermediate_size, found.num_hidden_layers) == (32, 48, 2)
    assert found.head_dim == getattr(dense.config, "head_dim", 8)
    assert found.tie_word_embeddings == dense.config.tie_word_embeddings


def test_the_embedded_model() -> None:
    found = locate_architecture(typed().model)
    assert (found.hidden_size, found.vocab_size, found.tie_word_embeddings) == (192, 4096, True)


def test_what_older_files_leave_out() -> None:
    settings = json.loads((EMBEDDED / "config.json").read_text())
    for name in ("num_key_value_heads", "head_dim", "tie_word_embeddings", "dtype"):
        settings.pop(name, None)
    found = read_architecture(settings | {"torch_dtype": "float16"})
    assert (found.num_key_value_heads, found.head_dim, found.tie_word_embeddings) == (6, 32, False)
    assert found.dtype == "float16"


def test_another_models_figures_are_refused() -> None:
    model = typed("model=llama2-7b").model
    other = typed("model=tinyllama").model.architecture
    assert other is not None
    with pytest.raises(UserError, match=r"model\.architecture\.hidden_size \(4096\) differs from 2048"):
        check_architecture(model, other)
    assert model.architecture is not None
    check_architecture(model, ArchitectureConfig(**{**vars_of(model.architecture), "dtype": "float32"}))


def vars_of(architecture: ArchitectureConfig) -> dict[str, object]:
    return {name: getattr(architecture, name) for name in ArchitectureConfig.__slots__}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json cannot be read"),
        ("[]", "config.json cannot be read"),
        ('{"model_type": "gpt2"}', "'gpt2' is not supported"),
        ("null", "config.json cannot be read"),
        ("[" * 1000 + "]" * 1000, "config.json cannot be read"),
        (
            '{"model_type": "llama", "num_attention_heads": 0, "hidden_size": 8}',
            "num_attention_heads .* is 0, not a whole",
        ),
        (
            '{"model_type": "llama", "num_attention_heads": 2, "hidden_size": null}',
            "hidden_size .* is None, not a whole",
        ),
        ('{"model_type": "llama", "num_attention_heads": 2, "hidden_size": 8}', "lacks 'intermediate_size'"),
    ],
)
def test_an_unreadable_configuration_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        locate_architecture(ModelConfig(name="here", path=str(tmp_path)))


def test_a_model_that_is_nowhere() -> None:
    with pytest.raises(UserError, match=r"set model\.architecture"):
        locate_architecture(ModelConfig(name="x", path="nobody/nothing"))
    with pytest.raises(UserError, match="no such directory"):
        locate_architecture(ModelConfig(name="x", path="/no/such/place"))


@pytest.mark.parametrize(
    ("command", "overrides", "named"),
    [
        ("evaluate", ["checkpoint=/nope"], "checkpoint=/nope: no such directory"),
        ("evaluate", ["checkpoint=HERE"], "checkpoint=HERE: no config.json in this directory"),
        ("generate", ["checkpoint=/nope", "prompt=a"], "checkpoint=/nope: no such directory"),
        ("generate", ["checkpoint=embedded", "compare=./nope", "prompt=a"], "compare=./nope: no such directory"),
        ("train", ["model=local", "model.path=/nope"], "model.path=/nope: no such directory"),
        ("plan", ["model=local", "model.path=./nope"], "model.path=./nope: no such directory"),
        ("push", ["checkpoint=/nope", "repo=a/b"], "checkpoint=/nope: no such directory"),
        ("verify", ["checkpoint=/nope"], "checkpoint=/nope: no such directory"),
    ],
)
def test_a_wrong_path_is_said_before_the_heavy_imports(
    command: str, overrides: list[str], named: str, tmp_path: Path
) -> None:
    code = (
        "import runpy, sys\n"
        "try:\n"
        f"    runpy.run_module('dive.{command}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    print(end.code)\n"
        "print(sorted({'torch', 'transformers', 'lightning', 'datasets'} & set(sys.modules)))\n"
    )
    arguments = [override.replace("HERE", str(tmp_path)) for override in overrides]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    said, heavy = done.stdout.strip().splitlines()[-2:]
    assert f"error: {named.replace('HERE', str(tmp_path))}" in said, done.stderr
    assert heavy == "[]"
