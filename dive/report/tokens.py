"""A text as HTML whose tokens have the colours of their experts.

Shapes: T tokens, E experts.
"""

import html
from collections.abc import Sequence

from dive.errors import require


def coloured_tokens(pieces: Sequence[str], experts: Sequence[int], *, count: int) -> str:
    """HTML of a text, with a colour for each expert and a legend; the text is escaped.

    Args:
        pieces: (T,) text of each token.
        experts: (T,) expert of each token, from 0.
        count: E, how many experts there are; what colour an expert has depends on it.

    Raises:
        UserError: the numbers of pieces and experts differ, or an expert is beyond the count.
    """
    require(len(pieces) == len(experts), f"there are {len(pieces)} tokens and the experts of {len(experts)}")
    beyond = sorted({expert for expert in experts if not 0 <= expert < count})
    require(not beyond, f"experts {beyond} are beyond the {count} that there are")
    words = "".join(_span(piece, expert, count) for piece, expert in zip(pieces, map(int, experts), strict=True))
    legend = " ".join(_span(f" {expert} ", expert, count) for expert in range(count))
    return (
        f'<div style="line-height: 1.8"><div style="white-space: pre-wrap; font-family: monospace">{words}</div>'
        f"<div>expert {legend}</div></div>"
    )


def _span(text: str, expert: int, count: int) -> str:
    hue = round(360 * expert / count)
    style = f"background: hsl({hue}, 75%, 82%); color: #111"
    return f'<span title="expert {expert}" style="{style}">{html.escape(text)}</span>'
