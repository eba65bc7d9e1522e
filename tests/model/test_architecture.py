"""Figures of a model without its weights."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from dive.cli import CONF, composed
from dive.config import ArchitectureConfig, Config, ModelConfig
from dive.errors import UserError
from dive.model.architecture import EMBEDDED, check_architecture, locate_architecture, read_architecture
from dive.plan.parameters import shapes


def typed(*overrides: str) -> Config:
    return composed(overrides)


# As the publishers and transformers count them.
PUBLISHED = {
    "tinyllama": 1_100_048_384,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3.2-1b": 1_235_814_400,
    "llama3.1-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
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


def test_a_models_own_configuration(dense: PreTrainedModel, tmp_path: Path) -> None:
    dense.config.save_pretrained(tmp_path)
    found = locate_architecture(ModelConfig(name="here", path=str(tmp_path)))
    assert found == read_architecture(dense.config.to_dict())
    assert (found.hidden_size, found.intermediate_size, found.num_hidden_layers) == (32, 48, 2)
    assert found.head_dim == dense.config.head_dim
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
