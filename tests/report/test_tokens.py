"""Texts in the colours of experts."""

import html
import re

import pytest

from dive.errors import UserError
from dive.report.tokens import coloured_tokens


def spans(page: str) -> list[tuple[str, str, str]]:
    """(title, style, text) of every span."""
    return re.findall(r'<span title="(.*?)" style="(.*?)">(.*?)</span>', page, flags=re.DOTALL)


def test_each_token_has_the_colour_of_its_expert() -> None:
    pieces = ["The", " cat", "\n", " sat"]
    found = spans(coloured_tokens(pieces, [0, 2, 2, 0], count=3))
    words, legend = found[:4], found[4:]
    assert [text for _, _, text in words] == pieces
    assert [title for title, _, _ in words] == ["expert 0", "expert 2", "expert 2", "expert 0"]
    assert [text.strip() for _, _, text in legend] == ["0", "1", "2"]
    colours = {title: style for title, style, _ in legend}
    assert len(set(colours.values())) == 3
    assert all(style == colours[title] for title, style, _ in words)


def test_text_is_escaped() -> None:
    text = "<script>alert('1')</script> & <b title=\"x\">"
    page = coloured_tokens([text], [0], count=1)
    assert "<script" not in page
    assert "<b " not in page
    assert html.unescape(spans(page)[0][2]) == text


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="2 tokens and the experts of 1"):
        coloured_tokens(["a", "b"], [0], count=1)
    with pytest.raises(UserError, match=r"experts \[2\] are beyond the 2"):
        coloured_tokens(["a", "b"], [0, 2], count=2)
