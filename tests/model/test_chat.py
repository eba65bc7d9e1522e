"""Conversations, against what transformers makes of the same messages."""

import pickle
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from dive.errors import UserError
from dive.model.chat import Conversation, conversation, passages
from dive.model.load import document_tokens

MESSAGES = [
    {"role": "system", "content": "the mat"},
    {"role": "user", "content": "12 + 30 = ?\n"},
    {"role": "assistant", "content": "42", "name": None},
]
WITHOUT_BOS = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '</s>' }}\n{% endfor %}"
LINES = "\n  {% if messages %}\n  {{ messages[0].content }}{% endif %}"
"""Its first line break is text, the blanks before the block are not."""


def test_by_hand(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<s>system: the mat</s>user: 12 + 30 = ?\n</s>assistant: 42</s>"
    found = conversation(chat_tokenizer, MESSAGES, "here")
    assert found == text
    assert found.spoken == ("12 + 30 = ?\n", "42")
    asked = conversation(chat_tokenizer, MESSAGES[:2], "here", prompt=True)
    assert asked == "<s>system: the mat</s>user: 12 + 30 = ?\n</s>assistant: "
    ids = document_tokens(chat_tokenizer, found)
    assert (ids.count(0), ids.count(1), ids[0], ids[-1]) == (1, 3, 0, 1)


@pytest.mark.parametrize("template", [None, WITHOUT_BOS, LINES])
def test_the_tokens_are_those_of_the_chat_template(
    chat_tokenizer: PreTrainedTokenizerFast, template: str | None
) -> None:
    if template is not None:
        chat_tokenizer.chat_template = template
    for prompt in (False, True):
        expected = chat_tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=prompt)["input_ids"]
        assert document_tokens(chat_tokenizer, conversation(chat_tokenizer, MESSAGES, "x", prompt=prompt)) == expected


def test_what_is_learned_from_is_the_same_every_day(
    chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(chat_template_utils.datetime):  # type: ignore[misc]
        @classmethod
        def now(cls, tz: Any = None) -> "Tomorrow":
            return cls(2031, 5, 7)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    chat_tokenizer.chat_template = (
        "{% if strftime_now is defined %}{{ 'Today is ' + strftime_now('%d %b %Y') }}{% endif %}"
    )
    assert conversation(chat_tokenizer, MESSAGES, "here") == "Today is 26 Jul 2024"
    assert conversation(chat_tokenizer, MESSAGES, "here", prompt=True) == "Today is 07 May 2031"


def test_the_default_of_several_templates(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    chat_tokenizer.chat_template = {"default": WITHOUT_BOS, "rag": "other"}
    assert conversation(chat_tokenizer, MESSAGES[2:], "here") == "assistant 42</s>\n"
    chat_tokenizer.chat_template = {"rag": "other"}
    with pytest.raises(UserError, match=r"^here: the chat template of model\.path=.* fails .*no default"):
        conversation(chat_tokenizer, MESSAGES, "here")


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (["hello"], None, r"message 1 needs a text under each of 'role' and 'content' \(it has str\)"),
        ([MESSAGES[1], {"from": "human"}], None, r"message 2 needs .* \(it has \{'from': 'str'\}\)"),
        ([{"role": "user", "content": None}], None, r"\(it has \{'role': 'str', 'content': 'NoneType'\}\)"),
        (
            [{"role": "pirate", "content": "arr"}],
            None,
            r"the chat template of checkpoint=.* \(unknown role\); change its",
        ),
        (MESSAGES, "{{ messages[0].content + 1 }}", "fails on this conversation"),
        (MESSAGES, "{% if %}", "fails on this conversation"),
        (MESSAGES, "{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),  # the sandbox holds
        (MESSAGES, "", "the tokenizer has no chat template; set checkpoint to a model that has one"),
    ],
)
def test_a_users_errors(
    chat_tokenizer: PreTrainedTokenizerFast, messages: list[Any], template: str | None, message: str
) -> None:
    if template is not None:
        chat_tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"^a.jsonl:3: .*{message}"):
        conversation(chat_tokenizer, messages, "a.jsonl:3", where="checkpoint")


def test_it_goes_to_another_process_as_it_is() -> None:
    found = pickle.loads(pickle.dumps(Conversation("<s>a", ["a"])))
    assert (type(found), found, found.spoken) == (Conversation, "<s>a", ("a",))


def test_what_of_a_document_is_its_own() -> None:
    assert passages(Conversation("system: be kind. user: a b", ["a b"])) == ("a b",)
    assert passages("a b") == ["a b"]
