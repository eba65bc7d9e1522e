"""What ``python -m dive.generate`` prints."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

import dive
from dive.api import reconstruct
from dive.errors import UserError
from dive.generate import GenerateConfig, generate, quoted
from tests.conftest import Build
from tests.workplace import environment

TEXT = "the cat sat"


@pytest.fixture(scope="module")
def dense(build: Build) -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def directories(
    dense: PreTrainedModel, tokens: Any, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """{"moe", "biased", "dense": directory}"""
    root = tmp_path_factory.mktemp("models")
    statistics = dive.collect_statistics(dense, {"a": tokens(2, 16), "b": tokens(2, 16, seed=1)})

    def experts(compensation: str) -> PreTrainedModel:
        settings = {"ratio": 0.5, "top_k": 1, "router_init": "random", "compensation": compensation}
        return reconstruct(dense, list(statistics.values()), **settings)  # type: ignore[arg-type]

    dive.save(experts("none"), tokenizer, root / "moe")
    dive.export.save_with_expert_bias(experts("bias"), tokenizer, root / "expert_bias")
    dense.save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    return {"moe": str(root / "moe"), "biased": str(root / "expert_bias"), "dense": str(root / "dense")}


def printed(capsys: pytest.CaptureFixture[str], **settings: Any) -> str:
    capsys.readouterr()
    generate(GenerateConfig(**{"prompt": TEXT, "max_new_tokens": 12, "device": "cpu", **settings}))
    return capsys.readouterr().out


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, new: int) -> str:
    """The prompt and its likeliest continuation, one forward pass a token; begun by BOS, ended by EOS."""
    ids = [0, *tokenizer(TEXT)["input_ids"]]
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:
            break
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_temperature_0_takes_the_likeliest_tokens(
    directories: dict[str, str],
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = printed(capsys, checkpoint=directories["dense"], temperature=0.0)
    assert found.strip("\n") == greedy(dense, tokenizer, 12).strip("\n")


def test_the_seed_decides_what_is_sampled(directories: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    texts = [printed(capsys, checkpoint=directories["moe"], temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(TEXT) and len(text) > len(TEXT) for text in texts)


def test_two_models_continue_the_same_text(directories: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"temperature": 0.0}
    both = printed(capsys, checkpoint=directories["biased"], compare=directories["dense"], **settings)
    alone = [printed(capsys, checkpoint=directories[name], **settings) for name in ("biased", "dense")]
    assert both == f"--- {directories['biased']}\n{alone[0]}--- {directories['dense']}\n{alone[1]}"
    assert alone[0] != alone[1]


def test_what_is_loaded_is_said_beside_the_text(
    directories: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    dense, moe = directories["dense"], directories["moe"]
    generate(GenerateConfig(prompt=TEXT, checkpoint=moe, compare=dense, max_new_tokens=1, device="cpu"))
    assert capsys.readouterr().err.splitlines()[0] == f"loading {moe} and {dense}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "/nowhere"}, "checkpoint=/nowhere: no such directory"),
        ({"compare": "/nowhere"}, "compare=/nowhere: no such directory"),
        ({"max_new_tokens": 64}, r"max_new_tokens \(64\) and the prompt's \d+ tokens exceed the model's 64 positions"),
        ({"temperature": -1.0}, r"temperature \(-1.0\) must be at least 0 and at most 1000"),
        ({"chat": True}, r"chat=true: checkpoint=.* has no chat template; set chat=false"),
        ({"top_p": 0.0}, r"top_p \(0.0\) must be above 0 and at most 1"),
    ],
)
def test_a_users_errors(
    directories: dict[str, str], capsys: pytest.CaptureFixture[str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        printed(capsys, **{"checkpoint": directories["moe"], **settings})


def test_any_text_can_be_a_prompt(directories: dict[str, str], tmp_path: Path) -> None:
    text = 'a, "b" (c) [d] {e} ${f} \\ \'g\' = 1: é \\" \\'
    line = [sys.executable, "-m", "dive.generate", f"checkpoint={directories['moe']}", f"prompt={text}"]
    settings = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*line, "max_new_tokens=2", "device=cpu"], **settings)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(text)
    assert list(tmp_path.iterdir()) == []  # no run directory for a text


def test_other_options_are_left_as_they_are() -> None:
    assert [quoted(argument) for argument in ("--help", "seed=1", "prompt")] == ["--help", "seed=1", "prompt"]


# -------------------------------------------------------------------------------------------------------- chat models


@pytest.fixture
def chat_model(dense: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    """A directory of a dense model whose tokenizer has a chat template."""
    dense.save_pretrained(tmp_path / "chat")
    chat_tokenizer.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, new: int) -> list[int]:
    """The likeliest tokens after the chat template's own prompt, one forward pass a token."""
    messages = [{"role": "user", "content": TEXT}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    start = len(ids)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


def test_a_chat_model_answers_a_users_message(
    chat_model: str,
    dense: PreTrainedModel,
    chat_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ids = answer(dense, chat_tokenizer, 12)
    assert 1 not in ids  # nothing has ended it yet
    found = printed(capsys, checkpoint=chat_model, temperature=0.0)
    assert found.rstrip("\n") == f"{TEXT}\n{chat_tokenizer.decode(ids)}".rstrip("\n")
    assert printed(capsys, checkpoint=chat_model, temperature=0.0, chat=True) == found


def test_an_answer_ends_where_generation_config_says(
    chat_model: str,
    dense: PreTrainedModel,
    chat_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ids = answer(dense, chat_tokenizer, 12)
    end = ids.index(ids[4])  # the first place where this token comes
    GenerationConfig(eos_token_id=[1, ids[4]]).save_pretrained(chat_model)
    found = printed(capsys, checkpoint=chat_model, temperature=0.0)
    assert found.rstrip("\n") == f"{TEXT}\n{chat_tokenizer.decode(ids[: end + 1])}".rstrip("\n")


def test_a_chat_model_goes_on_from_text_where_that_is_asked_for(
    chat_model: str, directories: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = printed(capsys, checkpoint=chat_model, temperature=0.0, chat=False)
    assert found == printed(capsys, checkpoint=directories["dense"], temperature=0.0)


def test_what_the_prompt_is_taken_for_is_said(
    chat_model: str, directories: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = directories["dense"]
    generate(GenerateConfig(prompt=TEXT, checkpoint=chat_model, compare=plain, max_new_tokens=1, device="cpu"))
    assert capsys.readouterr().err.splitlines() == [
        f"loading {chat_model} and {plain}",
        f"{chat_model}: the prompt is a user's message, by the chat template; chat=false goes on from it as text",
        f"{plain}: the prompt is text to go on from, without a chat template",
    ]
    generate(GenerateConfig(prompt=TEXT, checkpoint=chat_model, max_new_tokens=1, device="cpu", chat=False))
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"{chat_model}: the prompt is text to go on from; chat=true makes it a user's message"
    ]
