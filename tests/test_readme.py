"""The README fits on a few screens, and every command of it composes to a valid configuration."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dive.cli import CONF, PACKAGE, register_schema, to_typed
from dive.config import Config
from tests.commands import commands, typed

README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")


def test_there_are_commands() -> None:
    assert len(commands(README)) >= 6


@pytest.mark.parametrize("command", commands(README))
def test_command_composes(command: str) -> None:
    typed(command)


@pytest.mark.parametrize("domains", [None, "my texts, all"])
def test_make_real_composes(domains: str | None) -> None:
    asked = ["make", "--no-print-directory", "--dry-run", "real", *([f"DOMAINS={domains}"] if domains else [])]
    done = subprocess.run(asked, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    words = shlex.split(done.stdout.replace("\\\n", " ").partition("-m dive.train")[2])
    (model,) = (word for word in words if word.startswith("model.path="))
    assert model.endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    here = ["model.path=embedded" if word == model else word for word in words]  # the file need not have been fetched
    register_schema("config", Config)
    with initialize_config_dir(str(CONF), version_base=None):
        config = to_typed(compose("config", here), Config)
    assert config.calibration_domains.path == domains


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)", README):
        assert (Path(PACKAGE.parent) / target).exists(), target


def test_it_is_short_enough_to_be_read() -> None:
    assert len(README.splitlines()) <= 150


def test_every_switch_back_to_the_paper_composes() -> None:
    table = README.partition("| difference | switch back |")[2].partition("\n\n")[0]
    switches = re.findall(r"\| `([^`]+)` \|", table)
    assert len(switches) == 4
    for switch in switches:
        typed(f"python -m dive.train {switch}")
