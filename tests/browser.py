"""A page as Chromium sees it: what its scripts made of it, and what they complained of."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(slots=True)
class Page:
    """A loaded page."""

    dom: str
    """The document after its scripts, as HTML."""
    console: list[str]
    """Lines of the console."""

    @property
    def figures(self) -> dict[str, str]:
        """{name: HTML} of the figures that say they are drawn."""
        return dict(re.findall(r'<figure data-figure="(\w+)" data-drawn="true">(.*?)</figure>', self.dom, re.DOTALL))


def shapes(html: str) -> int:
    """Drawn shapes: rectangles, dots and lines of SVG."""
    return len(re.findall(r"<(?:rect|circle|path) ", html))


def browse(file: Path, profile: Path) -> Page:
    """Open a page from disk in headless Chromium, or skip the test where there is none."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    settings = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"),
        *("--enable-logging=stderr", "--virtual-time-budget=3000", "--window-size=1200,900", "--dump-dom"),
    ]
    done = subprocess.run(
        [program, *settings, file.as_uri()], capture_output=True, text=True, timeout=180, check=True, errors="replace"
    )
    return Page(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])
