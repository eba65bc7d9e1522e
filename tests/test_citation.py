"""CITATION.cff says what the package says."""

import tomllib

import yaml

from dive.cli import PACKAGE

ROOT = PACKAGE.parent


def test_version_licence_and_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    paper = cited["preferred-citation"]
    assert {author["family-names"] for author in paper["authors"]} >= {"Feng", "Wang"}
    number = paper["identifiers"][0]["value"].removeprefix("arXiv:")
    assert number in (ROOT / "README.md").read_text(encoding="utf-8")
