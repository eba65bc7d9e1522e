"""Command lines that pages show: found in their shell blocks, composed as they stand."""

import re
import shlex
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

from dive.cli import CONF, register_schema, to_typed
from dive.config import Config, EvaluateConfig
from dive.dashboard import DashboardConfig
from dive.generate import GenerateConfig, quoted
from dive.push import PushConfig
from dive.quantise import QuantiseConfig
from dive.verify import VerifyConfig

SCHEMAS: dict[str, tuple[str, type[Any]]] = {
    "train": ("config", Config),
    "plan": ("config", Config),
    "evaluate": ("evaluate", EvaluateConfig),
    "generate": ("generate", GenerateConfig),
    "push": ("push", PushConfig),
    "verify": ("verify", VerifyConfig),
    "quantise": ("quantise", QuantiseConfig),
    "dashboard": ("dashboard", DashboardConfig),
}
"""{command: (name of its YAML file, its schema)}"""
PLACEHOLDERS = ("DIR", "my_model", "my_chat_model")
"""Values of model.path that stand for a directory of the reader's."""


def blocks(text: str, language: str) -> list[str]:
    """Contents of a page's fenced blocks, those inside of tabs and boxes as well."""
    found = re.findall(rf"^ *```{language}\b[^\n]*\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return [str(content) for content in found]


def commands(text: str) -> list[str]:
    """Command lines of this package, continued lines joined, comments left out, without those that compose nothing."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    lines = [re.split(r"\s#", line)[0].strip() for line in lines]
    return [line for line in lines if (found := re.search(r"-m dive\.(\w+)", line)) and found[1] in SCHEMAS]


def first(override: Override) -> str:
    """An override, or the first of those that a sweep makes of it."""
    if not override.is_sweep_override():
        return str(override.input_line)
    swept = override.value()
    value = swept.start if isinstance(swept, IntervalSweep) else next(iter(override.sweep_iterator()))
    return f"{override.key_or_group}={value}"


def typed(command: str) -> Any:
    """The typed configuration of a command; of a sweep, that of the first value of each.

    Raises:
        UserError: it does not compose.
    """
    program, *words = shlex.split(command.partition("-m dive.")[2])
    name, schema = SCHEMAS[program]
    if "--cfg" in words:
        del words[words.index("--cfg") :]
    overrides = [quoted(word) for word in words if word != "-m"]
    if "-m" in words:
        parsed = [
            p for p in OverridesParser.create().parse_overrides(overrides) if not p.key_or_group.startswith("hydra")
        ]
        overrides = [first(override) for override in parsed]
    register_schema(name, schema)
    places = {f"model.path={place}" for place in PLACEHOLDERS}
    here = ["model.path=embedded" if override in places else override for override in overrides]
    with initialize_config_dir(str(CONF), version_base=None):
        return to_typed(compose(name, [override for override in here if not override.startswith("hydra.")]), schema)
