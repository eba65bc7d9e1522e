"""The site: its generated pages have every option of the schema, and it builds without a broken link."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints
from xml.etree import ElementTree

import pytest
import yaml

from dive.cli import CONF, PACKAGE, composed
from dive.config import Config

ROOT = PACKAGE.parent
DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """{path below docs/: Markdown} of the generated pages."""
    found: dict[str, str] = script("options").pages()
    return found


def leaves(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """Names of all options, those of settings that may be null and of entries by NAME included."""
    for name, hint in get_type_hints(schema).items():
        parts = [part for part in (hint, *get_args(hint)) if isinstance(part, type) and is_dataclass(part)]
        if name not in {entry.name for entry in fields(schema)}:
            continue  # a constant of the class
        nested = f"{prefix}{name}.NAME." if str(hint).startswith("dict[") else f"{prefix}{name}."
        if hint not in parts:
            yield f"{prefix}{name}"
        for part in parts:
            yield from leaves(part, nested)


def test_the_pages_have_every_option_and_no_other(pages: dict[str, str]) -> None:
    groups = {path: text for path, text in pages.items() if path != "options/commands.md"}
    named = [name for text in groups.values() for name in re.findall(r"^### `(.+?)` \{ #\1 \}$", text, re.MULTILINE)]
    assert len(set(named)) == len(named)
    assert set(named) == set(leaves(Config))
    assert len(named) > 150


def test_every_option_has_its_type_default_range_and_meaning(pages: dict[str, str]) -> None:
    text = "\n".join(pages.values())
    assert (
        "### `pruning.ratio` { #pruning.ratio }\n\n*number* · at least 0 and below 1 · default `0.75`\n\nShare of every"
        in text
    )
    assert "*whole number* · at least 1 and at most 1e7 · default `${budget.samples}`" in text
    assert "*one of `materialised`, `indexed`* · default `materialised`" in text
    assert "*text* · default none: it has to be set" in text
    rows = re.findall(r"^### `(.+?)` \{.*\}\n\n(\*.*)\n\n(.*)$", text, flags=re.MULTILINE)
    assert len(rows) == text.count("\n### `")
    assert [name for name, _, meaning in rows if not meaning] == []


def test_defaults_are_those_of_a_run(pages: dict[str, str]) -> None:
    config = composed(["model=local", "model.path=embedded"])
    shown = dict(
        re.findall(r"^### `(.+?)` \{.*\}\n\n\*.*\* .*default `(.*)`$", "\n".join(pages.values()), flags=re.MULTILINE)
    )
    compared = 0
    for name, written in shown.items():
        value: Any = config
        if "NAME" in name or "${" in written or name.startswith(("device", "dtype", "store", "checkpoint")):
            continue
        for part in name.split("."):
            value = getattr(value, part, None)
        if isinstance(value, Enum):
            value = value.name
        if isinstance(value, int | float | str) and not isinstance(value, bool) and written != "null":
            assert written == str(value), name
            compared += 1
    assert compared > 60


def test_every_preset_is_on_its_groups_page(pages: dict[str, str]) -> None:
    for folder in (entry for entry in CONF.iterdir() if entry.is_dir()):
        shown = re.findall(r'yaml title="conf/(\S+)"', pages[f"options/{folder.name}.md"])
        assert sorted(shown) == sorted(file.relative_to(CONF).as_posix() for file in folder.rglob("*.yaml"))


def test_every_page_stands_in_the_navigation_once(pages: dict[str, str]) -> None:
    def listed(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from listed(inner)

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    written = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")}
    assert sorted(listed(settings["nav"])) == sorted(written | pages.keys() | {"contributing.md", "changelog.md"})


def test_the_route_is_drawn_anew_where_its_script_changes() -> None:
    drawn = script("diagram").draw()
    assert (DOCS / "route.svg").read_text(encoding="utf-8") == drawn, "python docs/diagram.py draws it"
    ElementTree.fromstring(drawn)


def test_the_recording_is_of_its_transcript_and_fetches_nothing() -> None:
    transcript, drawn = ((DOCS / name).read_text(encoding="utf-8") for name in ("demo.txt", "demo.svg"))
    assert "make demo" in transcript
    shown = "".join(ElementTree.fromstring(drawn).itertext())
    for line in re.sub(r"\x1b\[[\d;]*m", "", transcript).splitlines():
        for word in line.split():
            assert word in shown.replace("\xa0", " "), line
    assert "url(http" not in drawn
    assert "href" not in drawn


def test_a_recording_leaves_out_progress_and_refuses_paths_of_the_machine() -> None:
    recording = script("recording")
    table = "\x1b[3m   Stage retrain: trained parameters  \x1b[0m\n┏━┓\n┃ part ┃\n│ all │\n└─┘\n"
    log = f"10:00:00 dense: computing perplexity\n10:00:01 pruning: 3/5, 2 s/layer, 4 s left\n{table}report   {ROOT}/outputs/1\n"
    said = recording.shortened(log, "make demo")
    assert re.sub(r"\x1b\[[\d;]*m", "", said) == "$ make demo\nreport   outputs/1\n"
    with pytest.raises(ValueError, match="a path of this machine: into /home/me"):
        recording.shortened("into \x1b[35m/home/me\x1b[0m", "make demo")
    assert "\x1b" not in recording.draw(said, "a title")


def built(root: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    """Build the site as ``make docs`` does."""
    pytest.importorskip("mkdocstrings", reason="pip install 'dive-moe[docs]'")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_site_builds_and_a_broken_link_stops_it(tmp_path: Path) -> None:
    copy = tmp_path / "here"
    for name in ("docs", "dive", "conf", "tests", "benchmarks", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy)
    done = built(copy, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/options/pruning.html").read_text(encoding="utf-8")
    assert 'id="pruning.ratio"' in page
    assert "reconstruct" in (tmp_path / "site/api.html").read_text(encoding="utf-8")
    for broken in ("[nowhere](nowhere.md)", "[no heading](faq.md#no-heading)", "[no option](options/moe.md#moe.none)"):
        (copy / "docs/index.md").write_text(f"# Quick start\n\n{broken}\n", encoding="utf-8")
        done = built(copy, tmp_path / "site")
        assert done.returncode != 0, broken
        assert re.findall(r"\((.*)\)", broken)[0].split("#")[-1] in done.stderr
