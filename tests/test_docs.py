"""Pages in docs/ and beside the README: every command composes, every snippet is run, every linked file is there."""

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
from tests.commands import blocks, commands, typed
from tests.conftest import Build
from tests.workplace import WORDS, environment

DOCS = PACKAGE.parent / "docs"
ROOT = PACKAGE.parent
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for file in [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
}
RUN_BY = {
    "docs/bring_your_own.md": "test_the_guides_run_from_top_to_bottom",
    "docs/serving.md": "test_the_guides_run_from_top_to_bottom",
    "docs/index.md": "test_the_guides_run_from_top_to_bottom",
    "README.md": "the same, and tests/test_api.py",
    "docs/api.md": "tests/test_api.py",
}
"""{page with Python: the test that runs it}"""
EVERY = [(page, command) for page, text in PAGES.items() for command in commands(text)]


@pytest.mark.parametrize(("page", "command"), EVERY)
def test_a_command_composes(page: str, command: str) -> None:
    typed(command)


def test_every_page_with_python_is_run_by_a_test() -> None:
    assert {page for page, text in PAGES.items() if blocks(text, "python")} == set(RUN_BY)


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


def test_every_preset_that_a_page_names_exists() -> None:
    text = "\n".join(PAGES.values())
    for group, number in (
        ("model", 13),
        ("experiment", 8),
        ("trainer", 4),
        ("moe", 5),
        ("retrain", 6),
        ("affinity", 4),
    ):
        named = re.findall(rf"(?<![\w.+/]){group}=([\w.|\\-]*\w)", text)
        presets = {preset for name in named for preset in name.replace("\\", "").split("|")}
        assert len(presets) >= number, group
        for preset in presets:
            assert (CONF / group / f"{preset}.yaml").is_file(), f"{group}={preset}"


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page: str) -> None:
    for target in re.findall(r"(?:\]\(|src=\")((?!https?:)[^)#\"]+)", PAGES[page]):
        generated = re.fullmatch(r"options/(\w+)\.md", target)
        there = generated is not None and (generated[1] == "index" or (CONF / generated[1]).is_dir())
        assert there or (ROOT / page).parent.joinpath(target).exists(), target


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

    guide = PAGES["docs/bring_your_own.md"]
    (python,) = blocks(guide, "python")
    exec(python, {"documents": documents})
    outputs = []
    for number, command in enumerate(commands(guide)):
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

    (loading, *_) = blocks(PAGES["README.md"], "python")
    assert loading.count("outputs/<date>/<time>/checkpoint") == 2
    loading = loading.replace("outputs/<date>/<time>/checkpoint", "outputs/mine/checkpoint")
    for content in (*blocks(PAGES["docs/serving.md"], "python"), *blocks(PAGES["docs/index.md"], "python"), loading):
        exec(content, {})
    assert capsys.readouterr().out.count("The tenant shall") == 2
