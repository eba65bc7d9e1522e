"""From a template and data to one HTML file that needs nothing else: no network, no file beside it.

Text is escaped by Jinja. Data for the figures stands in the page as JSON without ``<``, ``>`` and ``&``, and the page's content
security policy names its scripts by their hashes: nothing that data smuggles in runs, and nothing is fetched.
"""

import base64
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dive.units import clock, count, duration, operations, size

HTML = Path(__file__).parent / "html"
LIBRARIES = ("vendor/d3-7.9.2.min.js", "vendor/plot-0.6.17.umd.min.js", "charts.js")
"""D3 and Observable Plot (ISC licence, texts beside them), and what both pages share."""
UNITS: Mapping[str, Callable[[float], str]] = {
    "count": count,
    "duration": duration,
    "clock": clock,
    "size": size,
    "operations": operations,
}
"""Filters of the templates."""
NO_BREAK = "\u00a0"
"""A space that ends no line."""


def write_page(file: Path, template: str, *, script: str, data: Mapping[str, Any], **context: Any) -> Path:
    """Render ``html/<template>`` and write it so that a reader never sees half of it.

    Args:
        script: file in ``html/`` that draws the figures.
        data: what it draws, in the page as JSON; not-a-number becomes null.
        context: variables of the template.
    """
    environment = Environment(loader=FileSystemLoader(HTML), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"number": number, "percent": percent}
    environment.filters |= {name: partial(unbroken, write) for name, write in UNITS.items()}
    scripts = [(HTML / name).read_text(encoding="utf-8") for name in (*LIBRARIES, script)]
    page = environment.get_template(template).render(
        **context,
        data=compact(data),
        style=Markup((HTML / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(text) for text in scripts],
        hashes=[base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts],
    )
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    temporary.write_text(page, encoding="utf-8", newline="\n")
    os.replace(temporary, file)
    return file


def embedded(file: Path) -> str:
    """A PNG file as the data URL that the page's content security policy lets through."""
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def compact(value: Any) -> Any:
    """The same with five significant digits, and null for what JSON has no number for."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): compact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [compact(item) for item in value]
    return value


def number(value: float | None) -> str:
    """Four significant digits, or a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def percent(value: float | None) -> str:
    """0.256 as 26 %, or a dash."""
    return "–" if value is None else f"{value * 100:.0f}{NO_BREAK}%"


def unbroken(write: Callable[[float], str], value: float | None) -> str:
    """A figure and its unit on one line, or a dash."""
    return "–" if value is None else write(value).replace(" ", NO_BREAK)
