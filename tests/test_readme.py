"""Every command of the README composes to a valid configuration."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from dive.cli import CONF, PACKAGE, register_schema, to_typed
from dive.config import Config, EvaluateConfig
from dive.dashboard import DashboardConfig
from dive.generate import GenerateConfig
from dive.push import PushConfig
from dive.verify import VerifyConfig

SCHEMAS: dict[str, tuple[str, type]] = {
    "train": ("config", Config),
    "plan": ("config", Config),
    "evaluate": ("evaluate", EvaluateConfig),
    "generate": ("generate", GenerateConfig),
    "push": ("push", PushConfig),
    "verify": ("verify", VerifyConfig),
    "dashboard": ("dashboard", DashboardConfig),
}
README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Command lines of this package in the README's shell blocks, continued lines joined, comments left out."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if "-m dive." in line]


def test_there_are_commands() -> None:
    assert len(commands()) >= 6


@pytest.mark.parametrize("command", commands())
def test_command_composes(command: str) -> None:
    program, *words = shlex.split(command.partition("-m dive.")[2])
    name, schema = SCHEMAS[program]
    if "--cfg" in words:
        del words[words.index("--cfg") :]
    overrides = [word for word in words if word != "-m"]
    if "-m" in words:  # the first value of each sweep
        parsed = [
            p for p in OverridesParser.create().parse_overrides(overrides) if not p.key_or_group.startswith("hydra")
        ]
        overrides = [
            p.input_line
            if not p.is_sweep_override()
            else f"{p.key_or_group}={p.value().start if p.is_interval_sweep() else next(iter(p.sweep_iterator()))}"
            for p in parsed
        ]
    register_schema(name, schema)
    with initialize_config_dir(str(CONF), version_base=None):
        here = ["model.path=embedded" if override == "model.path=DIR" else override for override in overrides]
        to_typed(compose(name, here), schema)


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


def test_every_option_in_the_table_exists() -> None:
    for group in ("model", "affinity/published", "trainer", "logger", "experiment"):
        for name in re.findall(rf"`{group}=([a-z0-9_.|-]+)`", README):
            for option in name.split("|"):
                assert (CONF / group / f"{option}.yaml").is_file(), f"{group}={option}"
