"""Training of the embedded model by its recipe, in miniature, and what stands beside its weights."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dive.cli import PACKAGE
from tests.workplace import environment

TINY = PACKAGE / "model/tiny"
MINIATURE = (
    "--domains arithmetic calendar --vocabulary 512 --hidden 32 --channels 64 --layers 2 --heads 2 --kv-heads 1 --head-dim 16 "
    f"--positions 128 --tokens {60 * 8 * 64} --batch 8 --length 64 --windows 4 --learning-rate 1e-2"
)


def pretrain(output: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(TINY / "pretrain.py"), "--output", str(output), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def test_the_loss_falls_and_the_directory_loads(tmp_path: Path) -> None:
    done = pretrain(tmp_path, *MINIATURE.split())
    assert done.returncode == 0, done.stderr
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["last_loss"] < recipe["first_loss"] - 1
    assert recipe["steps"] == 60
    assert recipe["configuration"]["domains"] == ["arithmetic", "calendar"]
    assert all(1 < value < 100 for value in recipe["perplexity"].values())
    assert json.loads(done.stdout) == recipe["perplexity"]
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.num_parameters() == recipe["parameters"]
    text = "12 * 34 = 408\n\nIt was a Monday; café ½"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert model(input_ids=torch.tensor([ids])).logits.shape == (1, len(ids), len(tokenizer))


def test_what_cannot_be_trained_on_is_said_in_one_line(tmp_path: Path) -> None:
    done = pretrain(tmp_path / "model", "--domains", "poetry")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "poetry" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_card_has_the_figures_of_the_recipe() -> None:
    recipe, card = json.loads((TINY / "recipe.json").read_text()), (TINY / "README.md").read_text()
    for name, value in recipe["perplexity"].items():
        assert f"| {name} | {value:.2f} |" in card
    assert f"{recipe['tokens']:,} tokens in {recipe['steps']:,} steps" in card
    assert f"{recipe['parameters']:,} parameters" in card
