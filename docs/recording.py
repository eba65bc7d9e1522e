"""Draw docs/demo.svg, a terminal with what ``make demo`` printed::

    FORCE_COLOR=1 make demo 2>&1 | tee demo.log
    python docs/recording.py demo.log

Lines that only say how far a step is are left out. What is drawn stays in docs/demo.txt, escape sequences included.
"""

import re
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

HERE = Path(__file__).parent
ROOT = HERE.parent
WIDTH = 112
"""Characters of a line; longer ones go on in the next."""
LEFT_OUT = (
    r"^\d\d:\d\d:\d\d (.*: computing .*|.* left|loading .*|generated new .*)\n",
    r"^\S* +Stage \w+: trained parameters.*\n(.*[┏┃┡│└].*\n)+",
)
"""Lines of progress, and the table of what a stage trains."""
NORMAL = "3a4163 f48fb1 4db6ac ffb74d 8c9eff ce93d8 80deea eceefa"
BRIGHT = "7882aa f8bbd0 80cbc4 ffcc80 c5cae9 e1bee7 b2ebf2 ffffff"
THEME = TerminalTheme(
    (20, 23, 42), (222, 226, 244), *([tuple(bytes.fromhex(c)) for c in s.split()] for s in (NORMAL, BRIGHT))
)
"""The colours of the route's dark side: readable on a light page and on a dark one."""
FORMAT = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: {char_height}px/{line_height}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
.{unique_id}-title {{ font: bold 18px system-ui, Arial, sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""Rich's own frame without its fonts, which every reader would fetch from another host."""


def shortened(log: str, command: str) -> str:
    """Captured output below the command, without progress, and with paths as they are in a clone.

    Raises:
        ValueError: a path of this machine would be left.
    """
    said = log.replace(f"{ROOT}/", "").rstrip() + "\n"
    for pattern in LEFT_OUT:
        said = re.sub(pattern, "", said, flags=re.MULTILINE)
    if found := re.search(r"^.*(?<![\w.:/])/\w+/.*$", re.sub(r"\x1b\[[\d;]*m", "", said), flags=re.MULTILINE):
        raise ValueError(f"a path of this machine: {found[0]}")
    return f"\x1b[1;32m$\x1b[0m \x1b[1m{command}\x1b[0m\n{said}"


def draw(transcript: str, title: str) -> str:
    """A transcript with escape sequences as the picture of a terminal."""
    console = Console(record=True, width=WIDTH, file=StringIO(), highlight=False)
    console.print(Text.from_ansi(transcript), overflow="fold")
    return console.export_svg(title=title, theme=THEME, code_format=FORMAT, unique_id="demo")


if __name__ == "__main__":
    said = shortened(Path(sys.argv[1]).read_text(encoding="utf-8"), "make demo")
    (HERE / "demo.txt").write_text(said, encoding="utf-8")
    (HERE / "demo.svg").write_text(draw(said, "make demo"), encoding="utf-8")
