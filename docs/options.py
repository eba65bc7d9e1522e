"""Pages of the options, written from the docstrings of ``dive/config.py`` and the presets in ``conf/``.

``make docs`` builds them; none is kept in the repository.
"""

import inspect
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import hydra
from omegaconf import OmegaConf

from dive.__main__ import commands
from dive.bounds import Bounds
from dive.cli import CONF, register_schema
from dive.config import Config, EvaluateConfig
from dive.dashboard import DashboardConfig
from dive.generate import GenerateConfig
from dive.help import NEEDED, PRESETS_ALONE, docstring_of, meaning_of_preset, presets, written
from dive.push import PushConfig
from dive.quantise import QuantiseConfig
from dive.verify import VerifyConfig

COMMANDS: dict[str, type[Any]] = {
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "verify": VerifyConfig,
    "quantise": QuantiseConfig,
    "push": PushConfig,
    "dashboard": DashboardConfig,
}
"""Commands beside a run that have options of their own."""
GROUPS = tuple(entry.name for entry in fields(Config) if (CONF / entry.name).is_dir())
OWN_MODEL = ("model=local", "model.path=DIR")
"""Overrides whose defaults the pages show: those of a model of one's own, not those of the embedded toy."""


@dataclass(frozen=True, slots=True)
class Row:
    """One option."""

    name: str
    """As on the command line; NAME stands for a name that the user gives."""
    kind: str
    """Type, in words."""
    default: str
    bounds: str
    """Range of a number, of each number of a list; empty for others."""
    meaning: str
    """Markdown."""


def rows(schema: Any, values: Mapping[str, Any] | None, prefix: str = "") -> Iterator[Row]:
    """Every option of a dataclass type and of those in it, whether or not they are null by default.

    Args:
        values: defaults to show; those of the type itself where there are none.
        prefix: of the names.
    """
    hints = get_type_hints(schema)
    for entry in fields(schema):
        name, hint = f"{prefix}{entry.name}", hints[entry.name]
        inner, nullable = _without_null(hint)
        value = values[entry.name] if values is not None and entry.name in values else _default(entry)
        below = get_args(inner)[-1] if get_origin(inner) is dict else None
        if is_dataclass(inner) and not nullable:
            yield from rows(inner, value if isinstance(value, Mapping) else None, f"{name}.")
            continue
        bounds = entry.metadata.get("bounds")
        yield Row(
            name=name,
            kind=_in_words(inner) + (" or null" if nullable else ""),
            default="set by the preset" if is_dataclass(inner) and value else _shown(value),
            bounds=str(bounds) if isinstance(bounds, Bounds) else "",
            meaning=as_markdown(docstring_of(schema, entry.name)),
        )
        if is_dataclass(inner):
            yield from rows(inner, value if isinstance(value, Mapping) else None, f"{name}.")
        elif below is not None and is_dataclass(below):
            yield from rows(below, None, f"{name}.NAME.")


def page(group: str) -> str:
    """Markdown of a group's page: what it is, its presets, its options."""
    known = {entry.name: entry for entry in fields(Config)}
    said = as_markdown(docstring_of(Config, group)) if group in known else PRESETS_ALONE[group]
    lines = [f"# {group}", "", said, "", f"`python -m dive.train --help {group}` prints the same in the terminal.", ""]
    lines += ["## Presets", "", *_presets(group)]
    if group in known:
        lines += [
            "## Options",
            "",
            *_listed(rows(get_type_hints(Config)[group], composed_defaults()[group], f"{group}.")),
        ]
    return "\n".join(lines)


def index() -> str:
    """Markdown of the page that lists the groups, with the options that belong to none."""
    lines = [
        "# Options",
        "",
        "`python -m dive.train` takes one preset of each group, `group=preset`, and any option, `group.option=value`.",
        "An option that you set takes precedence over a preset, and a preset over the budget.",
        "",
        "The pages show the defaults for a model of your own (`model=local model.path=DIR`). In them",
        "",
        "- `${budget.samples}` is a figure of the chosen budget,",
        "- `${by_size:{0:full,5e9:lora}}` depends on the model's size: `full` from 0 parameters, `lora` from 5 billion,",
        "- `NAME` stands for a name that you choose, such as that of a retraining stage.",
        "",
        "| group | |",
        "| --- | --- |",
    ]
    for group in (*GROUPS, *PRESETS_ALONE):
        said = docstring_of(Config, group) if group in GROUPS else PRESETS_ALONE[group]
        lines.append(f"| [`{group}`]({group}.md) | {' '.join(as_markdown(said).split())} |")
    alone = [row for row in rows(Config, composed_defaults()) if "." not in row.name]
    return "\n".join([*lines, "", "## Options of no group", "", *_listed(alone)])


def commands_page() -> str:
    """Markdown of the page on every other command's options."""
    lines = [
        "# Other commands",
        "",
        "`python -m dive` lists them. Each is a script as well: `dive-generate`, and so on.",
        "",
    ]
    lines += ["| command | |", "| --- | --- |"]
    lines += [f"| `python -m {module}` | {said} |" for module, said in commands()]
    lines += ["", "`plan` takes the options of `train`; `report` and `store` show theirs by `--help`.", ""]
    for name, schema in COMMANDS.items():
        lines += [f"## dive.{name}", ""]
        listed = [row for row in rows(schema, None) if row.name.partition(".")[0] not in (*GROUPS,)]
        lines += [*_listed(listed, anchor=f"{name}.")]
        if name == "evaluate":
            lines += [
                "Its groups are [calibration_domains](calibration_domains.md), [eval](eval.md) and",
                "[budget](budget.md).",
                "",
            ]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """{path below docs/: Markdown} of all of them."""
    found = {f"options/{group}.md": page(group) for group in (*GROUPS, *PRESETS_ALONE)}
    return {"options/index.md": index(), **found, "options/commands.md": commands_page()}


def as_markdown(docstring: str) -> str:
    """A docstring's double backticks and references as Markdown's code."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", inspect.cleandoc(docstring))
    text = re.sub(r"``(.+?)``", _code, text, flags=re.DOTALL)
    return re.sub(r"\(docs/(\w+)\.md\)", r"([\1](../\1.md))", text)


def _code(found: "re.Match[str]") -> str:
    return f"`{' '.join(found[1].split())}`"


@cache
def composed_defaults() -> Mapping[str, Any]:
    """Defaults, with what follows from other options as it is written in ``conf/``."""
    register_schema("config", Config)
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        found: Any = OmegaConf.to_container(hydra.compose("config", list(OWN_MODEL)), resolve=False, enum_to_str=True)
    found["model"]["path"] = NEEDED
    return dict(found)


def _listed(listed: Iterator[Row] | list[Row], anchor: str = "") -> Iterator[str]:
    for row in listed:
        yield f"### `{row.name}` {{ #{anchor}{row.name} }}"
        yield ""
        yield " · ".join([f"*{row.kind}*", *([row.bounds] if row.bounds else []), f"default {row.default}"])
        yield ""
        yield row.meaning
        yield ""


def _presets(group: str) -> Iterator[str]:
    for name, file in presets([CONF], group).items():
        content = file.read_text(encoding="utf-8").rstrip()
        yield f'??? note "`{group}={name}`: {meaning_of_preset(file).replace(chr(34), chr(39))}"'
        yield ""
        yield f'    ```yaml title="conf/{file.relative_to(CONF).as_posix()}"'
        yield from (f"    {line}" for line in content.splitlines())
        yield "    ```"
        yield ""


def _default(entry: "Field[Any]") -> Any:
    return entry.default_factory() if entry.default_factory is not NO_DEFAULT else entry.default


def _shown(value: Any) -> str:
    if value == NEEDED:
        return "none: it has to be set"
    if isinstance(value, Mapping) and value:
        return f"`{{{', '.join(map(str, value))}}}`"
    return f"`{written(value)}`" if value != "" else "empty"


def _without_null(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None)), True
    return hint, False


def _in_words(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(f"`{choice.name}`" for choice in hint)
    if get_origin(hint) is list:
        return f"list, each {_in_words(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "settings by name"
    if is_dataclass(hint):
        return "settings"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[hint]


if __name__ == "__main__":
    for path, text in pages().items():
        print(f"<!-- {path} -->\n{text}")
