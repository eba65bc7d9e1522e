"""The guides in docs/: every command of this package composes, and those that need no GPU run as written."""

import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dive.cli import CONF, PACKAGE, register_schema, to_typed
from dive.config import Config, CorpusSource
from dive.errors import UserError
from dive.generate import GenerateConfig
from dive.push import PushConfig
from dive.verify import VerifyConfig
from tests.conftest import Build
from tests.workplace import WORDS, environment

DOCS = PACKAGE.parent / "docs"
SCHEMAS: dict[str, tuple[str, type[Any]]] = {
    "dive.train": ("config", Config),
    "dive.generate": ("generate", GenerateConfig),
    "dive.push": ("push", PushConfig),
    "dive.verify": ("verify", VerifyConfig),
}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"```(\w+)\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: str) -> list[str]:
    """Command lines of this package in a page's shell blocks, continued lines joined, comments left out."""
    shell = "\n".join(content for language, content in blocks(page) if language == "bash")
    lines = [line.split(" #")[0].strip() for line in shell.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("python -m dive.")]


EVERY = [(page, command) for page in ("bring_your_own.md", "serving.md") for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), EVERY)
def test_a_command_composes(page: str, command: str) -> None:
    module, *overrides = shlex.split(command)[2:]
    name, schema = SCHEMAS[module]
    register_schema(name, schema)
    with initialize_config_dir(str(CONF), version_base=None):
        quoted = [re.sub(r"^prompt=(.*)$", r'prompt="\1"', override) for override in overrides]
        here = ("model.path=my_model", "model.path=my_chat_model")
        found = ["model.path=embedded" if override in here else override for override in quoted]
        to_typed(compose(name, [override for override in found if not override.startswith("hydra.")]), schema)


def test_conversations_and_chat_models_on_the_hub_compose() -> None:
    text = (DOCS / "bring_your_own.md").read_text(encoding="utf-8")
    (corpus,) = re.findall(r"`(retrain\.corpus\.hub\.path=[^`]*)`", text)
    (model,) = re.findall(r"`(model=\S+ model\.path=[^`]*)`", text)
    register_schema("config", Config)
    with initialize_config_dir(str(CONF), version_base=None):
        config = to_typed(compose("config", [*shlex.split(corpus), *shlex.split(model)]), Config)
    assert config.retrain.corpus.chosen is CorpusSource.hub
    assert config.retrain.corpus.hub.template == "{messages}"
    assert config.model.path.endswith("-Instruct")


def test_a_corpus_on_the_hub_composes() -> None:
    text = (DOCS / "bring_your_own.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"`(retrain\.corpus\.source=hub [^`]*)`", text)
    register_schema("config", Config)
    with initialize_config_dir(str(CONF), version_base=None):
        corpus = to_typed(compose("config", shlex.split(line)), Config).retrain.corpus
        assert (corpus.hub.path, corpus.hub.streaming) == ("USER/SET", True)
        with pytest.raises(UserError, match=r"^retrain\.corpus\.hub\.path is needed"):
            to_typed(compose("config", ["retrain.corpus.source=hub"]), Config)


@pytest.mark.parametrize("page", ["bring_your_own.md", "serving.md"])
def test_linked_files_exist(page: str) -> None:
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)", (DOCS / page).read_text(encoding="utf-8")):
        assert (DOCS / target).exists(), target


def texts(words: list[str], documents: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=200)) for _ in range(documents)]


@pytest.mark.slow
def test_the_guides_run_from_top_to_bottom(
    build: Build,
    tokenizer: Any,
    chat_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for directory, cutter in (("my_model", tokenizer), ("my_chat_model", chat_tokenizer)):
        build("llama", max_position_embeddings=1024).save_pretrained(directory)
        cutter.save_pretrained(directory)
    domains = dict(zip(("law", "code", "news", "maths"), WORDS.values(), strict=True))
    documents = {name: texts(words, 100, seed) for seed, (name, words) in enumerate(domains.items())}
    os.mkdir("my_corpus")
    rows = [{"text": text} for seed, words in enumerate(WORDS.values(), start=9) for text in texts(words, 50, seed)]
    Path("my_corpus/part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("law", "code"):
        for split, part in (("test", documents[name][:20]), ("train", documents[name][20:])):
            talks = [[{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text}] for text in part]
            Path("my_chats", name).mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"messages": talk}) + "\n" for talk in talks]
            Path("my_chats", name, f"{split}.jsonl").write_text("".join(lines))
    Path("my_eval.txt").write_text("\n\n".join(texts(WORDS["news"], 30, 99)))

    (python,) = [content for language, content in blocks("bring_your_own.md") if language == "python"]
    exec(python, {"documents": documents})
    outputs = []
    for number, command in enumerate(commands("bring_your_own.md")):
        line = [sys.executable, *shlex.split(command)[1:]]
        if "dive.train" in line and "hydra.run.dir=" not in command:
            line.append(f"hydra.run.dir=outputs/{number}")
        done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        outputs.append(done.stdout)

    results = {
        d.name: json.loads((d / "results.json").read_text())
        for d in Path("outputs").iterdir()
        if (d / "results.json").is_file()
    }
    mine, some, given, corpus, measured = (results[name] for name in ("mine", "2", "3", "4", "5"))
    assert type(AutoModelForCausalLM.from_pretrained("outputs/mine/checkpoint")).__name__ == "MixtralForCausalLM"
    assert mine["groups"] == []  # experts begin with tokens
    assert outputs[1].count("The tenant shall") == 2
    assert some["evaluation"]["domains"] == ["law", "code"]
    assert given["groups"] == [["law", "news"], ["code"], ["maths"]]
    assert (
        load_file("outputs/3/checkpoint/model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"].shape[0] == 3
    )
    assert corpus["stages"][-1]["tokens"] == 262144
    assert corpus["stages"][-2]["reused"]
    assert corpus["run"]["fingerprints"]["retraining_corpus"] != mine["run"]["fingerprints"]["retraining_corpus"]
    assert "mine@256" in measured["stages"][0]["perplexity"]
    assert results["chat"]["run"]["samples"]["calibration"] == {"code": [4, 256], "law": [4, 256]}
    assert "When does the lease end?\n" in outputs[7]  # the answer stands on a line of its own
    assert "dry_run=true: nothing uploaded" in outputs[-1]

    for language, content in blocks("serving.md"):
        if language == "python":
            exec(content, {})
    assert "The tenant shall" in capsys.readouterr().out
