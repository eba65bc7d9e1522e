"""Training of the small dense model, in miniature."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dive.errors import UserError
from dive.pretrain import PretrainConfig, pretrain
from dive.pretrain_module import Windows


def miniature(directory: Path, **overrides: Any) -> PretrainConfig:
    settings: dict[str, Any] = {
        "output": str(directory / "model"),
        "directory": str(directory / "run"),
        "domains": ["arithmetic", "calendar"],
        "vocabulary": 512,
        "hidden": 32,
        "channels": 64,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 16,
        "positions": 128,
        "tokens": 60 * 8 * 64,
        "batch": 8,
        "length": 64,
        "windows": 4,
        "learning_rate": 1e-2,
        "checkpoint_every": 40,
    }
    return PretrainConfig(**{**settings, **overrides})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pretrain")
    pretrain(miniature(directory))
    return directory


def test_the_directory_loads_and_the_loss_fell(trained: Path) -> None:
    output = trained / "model"
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(output)
    recipe = json.loads((output / "recipe.json").read_text())
    assert json.loads((output / "config.json").read_text())["dtype"] == "float16"
    assert model.dtype == torch.float32
    assert model.num_parameters() == recipe["parameters"]
    assert recipe["last_loss"] < recipe["first_loss"] - 1
    assert all(1 < value < 100 for value in recipe["perplexity"].values())
    assert (output / "generation_config.json").is_file()
    assert str(trained) not in (output / "recipe.json").read_text() + (output / "README.md").read_text()
    text = "12 * 34 = 408\n\nIt was a Monday; café ½"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert model(input_ids=torch.tensor([ids])).logits.shape == (1, len(ids), len(tokenizer))


def test_a_resumed_run_ends_as_the_whole_one(trained: Path, tmp_path: Path) -> None:
    """The whole run's last checkpoint is of step 40 of 60."""
    (tmp_path / "run").symlink_to(trained / "run")
    pretrain(miniature(tmp_path, resume=True))
    whole, resumed = (
        json.loads((directory / "model" / "recipe.json").read_text()) for directory in (trained, tmp_path)
    )
    assert resumed["first_loss"] == whole["first_loss"]
    assert resumed["last_loss"] == pytest.approx(whole["last_loss"], rel=1e-4)
    assert resumed["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-2)


def test_nothing_to_resume_names_the_override(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resume: .*last\.ckpt does not exist"):
        pretrain(miniature(tmp_path, resume=True))


def test_an_unknown_domain_names_the_override(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^domains: \['poetry'\]"):
        pretrain(miniature(tmp_path, domains=["poetry"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 3, "kv_heads": 2}, "heads"),
        ({"length": 256}, "positions"),
        ({"vocabulary": 200}, "vocabulary"),
        ({"tokens": 0}, "tokens"),
        ({"domains": []}, "domains"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        miniature(tmp_path, **overrides)


def test_windows_go_on_where_they_were() -> None:
    def windows() -> Windows:
        return Windows([torch.arange(500), torch.arange(1000, 1400)], batch=4, length=16, long=32, long_every=3, seed=1)

    whole = iter(windows())
    batches = [next(whole) for _ in range(6)]
    assert [tuple(batch.shape) for batch in batches[:3]] == [(4, 16), (4, 16), (2, 32)]
    later = windows()
    later.start = 4
    assert torch.equal(next(iter(later)), batches[4])
    assert all(bool((row.diff() == 1).all()) for batch in batches for row in batch)
