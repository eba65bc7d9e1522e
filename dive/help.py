"""What ``--help`` prints: a command's own options, each with its value and its meaning, read off the schema and the presets."""

import ast
import inspect
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import hydra
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dive.errors import UserError

COLUMN = 34
"""Where meanings begin."""
WIDTH = 120
"""Longest line, in a wide terminal."""
NEEDED = "???"
"""OmegaConf's value of an option that has none."""
PRESETS_ALONE = {"experiment": "Whole recipes, and sweeps that answer what they are called."}
"""Groups of presets without options of their own."""
FLAGS = {
    "--cfg job --resolve": "Print the composed configuration, and run nothing.",
    "--hydra-help": "Hydra's own flags, shell completion among them.",
}
FLAGS_OF_GROUPS = {
    "--help NAME": "The options and presets of a group, or the options whose names begin with NAME.",
    "--config-dir DIR": "Look for presets of your own in DIR.",
    "-m": "Sweep: option=a,b makes one run for a and one for b.",
}


@dataclass(frozen=True, slots=True)
class Option:
    """One leaf of the configuration."""

    name: str
    value: Any
    meaning: str


def help_text(
    description: str,
    config_name: str,
    schema: type[Any],
    conf: Path,
    arguments: Sequence[str],
    *,
    config_dir: str | None = None,
) -> str:
    """Description, options, groups and flags; with the name of a group or an option among the arguments, its options.

    Args:
        description: docstring of the command's module: what it does, how it is called, and what else is worth saying.
        config_name: of its YAML file in ``conf``.
        arguments: overrides, which decide the values shown, and names to tell about.
        config_dir: of presets of the user's own.

    Raises:
        UserError: there is no group or option of that name.
        HydraException: an override is wrong.
    """
    places = [conf, *([Path(config_dir).resolve()] if config_dir else [])]
    names = [argument for argument in arguments if re.fullmatch(r"[\w./-]+", argument)]
    overrides = [argument for argument in arguments if argument not in names]
    overrides += [f"hydra.searchpath=[file://{places[-1]}]"] if config_dir else []
    with hydra.initialize_config_dir(str(conf), version_base=None):
        composed = hydra.compose(config_name, overrides, return_hydra_config=True)
    chosen: Mapping[str, str | None] = OmegaConf.to_container(composed.hydra.runtime.choices)  # type: ignore[assignment]
    own = OmegaConf.masked_copy(composed, [entry.name for entry in fields(schema)])
    try:
        values: Any = OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException:  # what follows from a model that is not named yet
        values = OmegaConf.to_container(own)
    options = list(walk(schema, values))
    groups = {e.name: meaning_of(schema, e.name) for e in fields(schema) if presets(places, e.name)}
    groups |= {name: meaning for name, meaning in PRESETS_ALONE.items() if name in chosen}
    if names:
        return "\n".join(line for name in names for line in _about(name, groups, options, places)).rstrip()
    lines = [*_introduction(description), ""]
    alone = [option for option in options if option.name.partition(".")[0] not in groups]
    lines += ["Options:", *(line for option in alone for line in _row(option))]
    if groups:
        lines += ["", "Groups, with the preset that is chosen, and the others in brackets:"]
        for name, meaning in groups.items():
            picked = _picked(name, chosen, own.get(name))
            lines += _columns(f"{name}={','.join(picked)}", _first_sentence(meaning))
            others = ", ".join(preset for preset in presets(places, name) if preset not in picked)
            lines += _columns("", f"[{others}]") if others else []
        lines += ["", "--help GROUP shows a group's options and presets with their meanings."]
    lines += ["", "Flags:"]
    for flag, meaning in (FLAGS_OF_GROUPS | FLAGS if groups else FLAGS).items():
        lines += _columns(flag, meaning)
    return "\n".join(lines)


def walk(schema: Any, values: Mapping[str, Any] | None, prefix: str = "") -> Iterator[Option]:
    """Every option of a dataclass type, and of those in it, with its value in ``values`` or else its default."""
    hints = get_type_hints(schema)
    for entry in fields(schema):
        name, meaning = f"{prefix}{entry.name}", meaning_of(schema, entry.name)
        hint = _inner(hints[entry.name])
        default = entry.default_factory() if entry.default_factory is not NO_DEFAULT else entry.default
        value = values.get(entry.name) if values is not None else default
        below = get_args(hint)[-1] if get_origin(hint) is dict else None
        if is_dataclass(hint) and value is not None:
            yield from walk(hint, value if isinstance(value, Mapping) else None, f"{name}.")
        elif below is not None and is_dataclass(below):
            known = value if isinstance(value, Mapping) else {}
            yield Option(name, "{" + ", ".join(known) + "}", meaning)
            if len(known) == 1:
                (only,) = known
                yield from walk(below, known[only], f"{name}.{only}.")
            else:
                yield from walk(below, None, f"{name}.NAME.")
        else:
            choices = f" One of {', '.join(c.name for c in hint)}." if _is_enum(hint) else ""
            yield Option(name, value, f"{meaning}{choices}".strip())


@cache
def _documented(module: str) -> dict[str, dict[str, str]]:
    """{class: {attribute: the string under it}} of a module's source; a class's own under the empty name."""
    file = sys.modules[module].__file__
    assert file is not None
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        found[node.name] = {"": ast.get_docstring(node) or ""}
        for entry, under in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(entry, ast.AnnAssign)
                and isinstance(entry.target, ast.Name)
                and isinstance(under, ast.Expr)
                and isinstance(under.value, ast.Constant)
            ):
                found[node.name][entry.target.id] = inspect.cleandoc(str(under.value.value))
    return found


def docstring_of(schema: type[Any], name: str) -> str:
    """The string under a field; where there is none, what its type says of itself."""
    said = _documented(schema.__module__).get(schema.__name__, {}).get(name, "")
    if not said:
        hint = _inner(get_type_hints(schema)[name])
        if is_dataclass(hint) or _is_enum(hint):
            said = _documented(hint.__module__).get(hint.__name__, {}).get("", "")
    return said


def meaning_of(schema: type[Any], name: str) -> str:
    """The first paragraph of :func:`docstring_of`, without markup."""
    paragraph = " ".join(docstring_of(schema, name).partition("\n\n")[0].split())
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", paragraph.replace("``", ""))


def presets(places: Sequence[Path], group: str) -> dict[str, Path]:
    """{preset of a group: its file}, those in folders last."""
    found = {
        file.relative_to(place / group).with_suffix("").as_posix(): file
        for place in places
        for file in (place / group).rglob("*.yaml")
    }
    return dict(sorted(found.items(), key=lambda item: (item[0].count("/"), item[0])))


def meaning_of_preset(file: Path) -> str:
    """The first sentence of the comment that a preset begins with."""
    said = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            said.append(line.lstrip("# "))
    return re.split(r"(?<=[a-z)\]`])\. |(?<=[a-z)\]`]): (?=[A-Z])", " ".join(said).rstrip("."))[0]


def _picked(group: str, chosen: Mapping[str, str | None], composed: Any) -> list[str]:
    """Presets of a group that are chosen; Hydra does not name those that stand beside each other, as loggers may."""
    if group in chosen:
        return [chosen[group] or "null"]
    return [name for name, settings in (composed or {}).items() if settings is not None] or ["null"]


def _first_sentence(meaning: str) -> str:
    return re.split(r"(?<=\.) (?=[A-Z])", meaning)[0]


def _about(name: str, groups: Mapping[str, str], options: Sequence[Option], places: Sequence[Path]) -> Iterator[str]:
    found = [option for option in options if option.name == name or option.name.startswith(f"{name}.")]
    files = presets(places, name) if found or name in PRESETS_ALONE else {}
    if not found and not files:
        raise UserError(f"--help {name}: no group or option has this name; --help lists them")
    if name in groups:
        yield from textwrap.wrap(groups[name], min(WIDTH, shutil.get_terminal_size().columns))
        yield ""
    if files:
        yield f"Presets, {name}=PRESET:"
        for preset, file in files.items():
            yield from _columns(preset, meaning_of_preset(file))
        yield ""
    if found:
        yield "Options:"
        for option in found:
            yield from _row(option)
        yield ""


def _introduction(description: str) -> Iterator[str]:
    first, _, rest = inspect.cleandoc(description).partition("\n\n")
    said, colon, calls = " ".join(first.split()).partition(": ``")
    yield said if colon else said.rstrip(".")
    if colon:
        yield ""
        yield f"  {calls.replace('``', '').rstrip('.')}"
    if rest:
        yield ""
        yield rest.replace("::\n", ":\n").replace("``", "")


def _row(option: Option) -> Iterator[str]:
    value = "(needed)" if option.value == NEEDED else written(option.value)
    yield from _columns(f"{option.name}={value}", option.meaning)


def _columns(left: str, right: str) -> Iterator[str]:
    width = min(WIDTH, shutil.get_terminal_size().columns)
    lines = textwrap.wrap(right, max(24, width - COLUMN), break_long_words=False, break_on_hyphens=False) or [""]
    if len(left) + 4 > COLUMN and lines != [""]:
        yield f"  {left}"
        left = ""
    for line in lines:
        yield f"{f'  {left}':<{COLUMN}}{line}".rstrip()
        left = ""


def written(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(written(item) for item in value)}]"
    return str(value).replace("\n", "\\n")


def _inner(hint: Any) -> Any:
    """The type beside None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)
