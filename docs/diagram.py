"""Draw docs/route.svg, the route from a dense model to a served Mixture-of-Experts: ``python docs/diagram.py``."""

from collections.abc import Iterator
from pathlib import Path

WIDTH, HEIGHT = 760, 470
PANEL = (232, 208)
"""Width and height of a panel."""
GAP, TOP = 16, 16
KINDS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")
"""Colours of the four kinds of text, and of the experts that serve them."""
KEPT = ((0, 3, 8, 13), (1, 5, 8, 10), (2, 6, 11, 13), (4, 7, 12, 15))
"""Channels of sixteen that each expert keeps; some are kept by two."""
STYLE = """
svg { --paper: #ffffff; --panel: #f4f5fb; --line: #c5cae0; --ink: #1c2340; --soft: #5b6486; --grey: #aab1cc;
  --a: #3f51b5; --b: #00897b; --c: #ef6c00; --d: #c2185b; }
@media (prefers-color-scheme: dark) { svg { --paper: #14172a; --panel: #1e2238; --line: #3a4163; --ink: #eceefa;
  --soft: #a9b1d6; --grey: #666f94; --a: #8c9eff; --b: #4db6ac; --c: #ffb74d; --d: #f48fb1; } }
text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--ink); }
.title { font-size: 17px; font-weight: 600; } .said { fill: var(--soft); } .small { font-size: 13px; }
.line { stroke: var(--soft); stroke-width: 2; fill: none; } .middle { text-anchor: middle; }
"""


def rectangle(x: float, y: float, width: float, height: float, fill: str, *, radius: float = 3, more: str = "") -> str:
    """One rectangle; ``more`` holds further attributes."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}"{more}/>'


def words(x: float, y: float, said: str, kind: str = "") -> str:
    """One line of text whose baseline is at ``y``."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{said}</text>'


def line(points: str, *, more: str = "") -> str:
    """A path through ``points``, in SVG's notation."""
    return f'<path class="line" d="{points}"{more}/>'


def dense(x: float, y: float) -> Iterator[str]:
    """Three layers, each an attention block and one wide FFN."""
    for layer in range(3):
        top = y + 6 + 34 * layer
        yield rectangle(x, top, 40, 24, "var(--line)")
        for channel in range(16):
            yield rectangle(x + 50 + 9 * channel, top, 7, 24, "var(--grey)", radius=1.5)


def domains(x: float, y: float) -> Iterator[str]:
    """Four documents of different kinds."""
    for number, (name, fill) in enumerate(zip(("code", "maths", "law", "news"), KINDS, strict=True)):
        left, top = x + 102 * (number % 2), y + 52 * (number // 2)
        yield rectangle(left, top, 94, 44, fill, radius=6, more=' fill-opacity="0.18"')
        yield rectangle(left, top, 6, 44, fill, radius=3)
        yield words(left + 18, top + 28, name)


def pruned(x: float, y: float) -> Iterator[str]:
    """The same FFN four times; each kind of text keeps other channels."""
    for row, (fill, kept) in enumerate(zip(KINDS, KEPT, strict=True)):
        for channel in range(16):
            seen = channel in kept
            shade = fill if seen else "var(--line)"
            opacity = "" if seen else ' fill-opacity="0.55"'
            yield rectangle(x + 12.4 * channel, y + 26 * row, 9, 20, shade, radius=2, more=opacity)


def mixture(x: float, y: float) -> Iterator[str]:
    """A token, the router, and four experts of which one is active."""
    yield words(x, y + 55, "token", "small")
    yield f'<circle cx="{x + 68:g}" cy="{y + 50:g}" r="12" fill="var(--soft)"/>'
    yield words(x + 46, y + 84, "router", "small said")
    for row, fill in enumerate(KINDS):
        top, active = y + 26 * row, row == 1
        yield line(f"M{x + 80:g} {y + 50:g} L{x + 128:g} {top + 10:g}", more="" if active else ' stroke-opacity="0.25"')
        yield rectangle(x + 128, top, 72, 20, fill, radius=4, more="" if active else ' fill-opacity="0.3"')


def retrained(x: float, y: float) -> Iterator[str]:
    """Perplexity that falls towards the dense model's."""
    yield line(f"M{x:g} {y:g} V{y + 96:g} H{x + 200:g}")
    yield line(f"M{x:g} {y + 78:g} H{x + 200:g}", more=' stroke-dasharray="5 5" stroke-opacity="0.7"')
    yield words(x + 6, y + 93, "dense", "small said")
    points = " ".join(f"L{x + 6 + 6 * step:g} {y + 72 - 66 * 0.9**step:.1f}" for step in range(33))
    yield f'<path d="M{points[1:]}" fill="none" stroke="var(--b)" stroke-width="4" stroke-linecap="round"/>'
    yield words(x + 44, y + 20, "perplexity", "small said")


def served(x: float, y: float) -> Iterator[str]:
    """Engines that load the directory."""
    for number, name in enumerate(("transformers", "vLLM", "SGLang", "llama.cpp")):
        left, top = x + 102 * (number % 2), y + 52 * (number // 2)
        more = ' stroke="var(--line)" stroke-width="2"'
        yield rectangle(left, top, 98, 44, "var(--paper)", radius=8, more=more)
        yield words(left + 49, top + 28, name, "middle small")


STATIONS = (
    ("1  Dense model", "one wide FFN in each layer", dense),
    ("2  Domains", "texts of several kinds", domains),
    ("3  Pruned experts", "each keeps other channels", pruned),
    ("4  Mixture-of-Experts", "a router picks one per token", mixture),
    ("5  Retrained", "taught by the dense model", retrained),
    ("6  Served", "as a stock model class", served),
)


def draw() -> str:
    """The whole picture."""
    width, height = PANEL
    parts = [rectangle(0, 0, WIDTH, HEIGHT, "var(--paper)", radius=12)]
    places = [
        (GAP + (width + GAP) * (number % 3), TOP + (height + 2 * GAP) * (number // 3))
        for number in range(len(STATIONS))
    ]
    for (x, y), (title, said, picture) in zip(places, STATIONS, strict=True):
        parts.append(rectangle(x, y, width, height, "var(--panel)", radius=10, more=' stroke="var(--line)"'))
        parts += [words(x + 16, y + 32, title, "title"), words(x + 16, y + 55, said, "said"), *picture(x + 16, y + 84)]
    middle = TOP + height / 2
    for row in (middle, middle + height + 2 * GAP):
        for column in (1, 2):
            left = GAP + (width + GAP) * column - GAP
            parts.append(line(f"M{left + 2:g} {row - 6:g} l8 6 l-8 6"))
    end, turn = GAP + width / 2, TOP + height + GAP
    parts.append(line(f"M{WIDTH - end:g} {turn - GAP:g} V{turn:g} H{end:g} V{turn + GAP - 3:g} m-6 -6 l6 7 l6 -7"))
    said = "From a dense model through domains and pruned experts to a Mixture-of-Experts that is retrained and served"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("route.svg").write_text(draw(), encoding="utf-8")
