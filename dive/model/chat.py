"""Conversations as text: what a tokenizer's chat template makes of a list of messages."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dive.errors import UserError, one_line, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAME_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"
"""Goes before a template. Many write today's date (Llama 3.2), and the same text would be another one tomorrow. The date is
the one that Llama's templates fall back to."""


class Conversation(str):
    """A whole conversation as its chat template writes it, special tokens included.

    It makes the tokens that ``apply_chat_template`` makes: none goes before it. Slices and joins of it are plain text.
    """

    spoken: tuple[str, ...]
    """Its messages but the system's, without what the template adds to every conversation."""

    def __new__(cls, text: str, spoken: Sequence[str] = ()) -> "Conversation":
        """
        Args:
            text: what the template wrote.
        """
        made = super().__new__(cls, text)
        made.spoken = tuple(spoken)
        return made


Chat = Callable[[Sequence[object], str], Conversation]
"""(messages, what to begin errors with) -> conversation; of :func:`conversation`."""


def conversation(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[object],
    named: str,
    *,
    where: str = "model.path",
    prompt: bool = False,
) -> Conversation:
    """What the tokenizer's chat template makes of messages, in transformers' sandbox; empty if there are none.

    Args:
        messages: ``{"role": ..., "content": ...}`` each, both text; what else they have goes to the template as well.
        named: what to begin errors with.
        where: override that named the tokenizer's model, for errors.
        prompt: an answer is to follow: end as its beginning, and tell today's date where the template does.

    Raises:
        UserError: a message is malformed, or there is no chat template, or it fails on these messages.
    """
    if not messages:
        return Conversation("")
    spoken = []
    for number, message in enumerate(messages, start=1):
        fields = message if isinstance(message, Mapping) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            kinds = {key: type(value).__name__ for key, value in fields.items()} or type(message).__name__
            raise UserError(
                f"{named}: message {number} needs a text under each of 'role' and 'content' (it has {kinds})"
            )
        if role != "system":
            spoken.append(content)
    require(
        bool(tokenizer.chat_template),
        f"{named}: this is a conversation, and the tokenizer has no chat template; set {where} to a model that has one, as "
        "Instruct models do, or name a column of plain text",
    )
    try:
        template = tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template if prompt else SAME_DAY + template,
            add_generation_prompt=prompt,
            tokenize=False,
        )
    except Exception as error:  # jinja's, those of a template's own expressions, and those of what calls it
        raise UserError(
            f"{named}: the chat template of {where}={tokenizer.name_or_path} fails on this conversation ({one_line(error)}); "
            "change its messages, or take it out"
        ) from error
    return Conversation(str(text), spoken)


def passages(document: str) -> Sequence[str]:
    """What of a document is its own: of a conversation what is spoken in it, else all of it."""
    return document.spoken if isinstance(document, Conversation) else [document]
