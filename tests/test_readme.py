"""Every command of the README composes to a valid configuration."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from dive.cli import CONF, PACKAGE, register_schema, to_typed
from dive.config import Config

README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Command lines of ``dive.train`` in the README's shell blocks, continued lines joined, comments left out."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if "-m dive.train" in line]


def test_there_are_commands() -> None:
    assert len(commands()) >= 6


@pytest.mark.parametrize("command", commands())
def test_command_composes(command: str) -> None:
    words = shlex.split(command.partition("dive.train")[2])
    if "--cfg" in words:
        del words[words.index("--cfg") :]
    overrides = [word for word in words if word != "-m"]
    if "-m" in words:  # the first value of each sweep
        parsed = OverridesParser.create().parse_overrides(overrides)
        overrides = [f"{p.key_or_group}={next(iter(p.sweep_iterator()))}" for p in parsed]
    register_schema("config", Config)
    with initialize_config_dir(str(CONF), version_base=None):
        to_typed(compose("config", overrides), Config)


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", README):
        assert (Path(PACKAGE.parent) / target).exists(), target


def test_every_option_in_the_table_exists() -> None:
    for group in ("model", "affinity/published", "trainer", "logger", "experiment"):
        for name in re.findall(rf"`{group}=([a-z0-9_.|-]+)`", README):
            for option in name.split("|"):
                assert (CONF / group / f"{option}.yaml").is_file(), f"{group}={option}"
