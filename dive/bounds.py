"""Bounds of numbers, as metadata of a dataclass' fields, and the one checker that holds a tree of dataclasses to them."""

import math
import re
from collections.abc import Callable
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from dive.errors import require


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Where a number may lie."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def hold(self, number: float) -> bool:
        """Whether the number is finite and lies in them."""
        return (
            (isinstance(number, int) or math.isfinite(number))  # an int may be too large for a float
            and (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.below is None or number < self.below)
            and (self.at_most is None or number <= self.at_most)
        )

    def __str__(self) -> str:
        named = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        return " and ".join(f"{name} {_figure(n)}" for name, n in named.items() if n is not None) or "finite"


def _figure(number: float) -> str:
    short = f"{number:g}"
    return re.sub(r"e\+0*", "e", short) if float(short) == number else str(number)


def bounded(
    default: Any = NO_DEFAULT,
    *,
    default_factory: Callable[[], Any] | None = None,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field whose number, or each number of whose list, :func:`check_bounds` holds to these bounds."""
    bounds = Bounds(above=above, at_least=at_least, below=below, at_most=at_most)
    if default_factory is not None:
        return field(default_factory=default_factory, metadata={"bounds": bounds})
    return field(default=default, metadata={"bounds": bounds})


def check_bounds(value: Any, where: str = "") -> None:
    """Hold every number of a tree of dataclasses, of dicts and of lists to the bounds of its field.

    Null passes where the field's type admits it. Infinity and not-a-number pass nowhere, nor do lists and dicts where the
    type has none, which OmegaConf lets through inside of lists.

    Args:
        value: a dataclass of this schema.
        where: its place in the configuration, such as ``retrain``, with which the messages begin.

    Raises:
        UserError: names the override and says what it must be.
    """
    for entry in fields(value):
        path = f"{where}.{entry.name}" if where else entry.name
        _check_value(getattr(value, entry.name), path, entry.metadata.get("bounds", Bounds()), entry.type)


def _check_value(value: Any, path: str, bounds: Bounds, kind: Any) -> None:
    nullable = get_origin(kind) is UnionType
    (kind,) = [choice for choice in get_args(kind) if choice is not NoneType] if nullable else [kind]
    if is_dataclass(value):
        check_bounds(value, path)
    elif isinstance(value, dict | list):
        wanted = {str: "text", int: "a whole number", float: "a number"}.get(kind, "something else")
        require(get_origin(kind) is type(value), f"{path} must be {wanted}, not a {type(value).__name__}")
        of_each = get_args(kind)[-1]
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_value(item, f"{path}.{name}" if isinstance(value, dict) else f"{path}[{name}]", bounds, of_each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        require(bounds.hold(value), f"{path} ({value}) must be {bounds}{', or null' if nullable else ''}")
