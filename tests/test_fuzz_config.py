"""Random values for every option: a typed configuration comes out, or one line that names the override; never anything else.

The options are found by walking the schema, so that new ones are covered by themselves.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import pytest
from hydra.core.override_parser.types import Quote, QuotedString
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dive.bounds import Bounds
from dive.cli import CONF, composed
from dive.config import Config, ModelConfig
from dive.errors import UserError
from dive.model.architecture import locate_architecture
from dive.model.load import DenseSource, locate_dense
from dive.pipeline import check
from dive.plan.capacity import Capacity, shortages
from dive.plan.stages import plan
from dive.plan.table import full_text


@dataclass(frozen=True)
class Leaf:
    """One option of the configuration."""

    path: str
    kind: Any
    bounds: Bounds
    entry: tuple[str, ...] = ()
    """Of a dict that has none: the path of a new one and inside of it."""

    def override(self, text: str) -> str:
        """What sets it on a command line."""
        if not self.entry:
            return f"{self.path}={text}"
        for name in reversed(self.entry):
            text = f"{{{name}:{text}}}"
        return f"+{self.path}={text}"


def leaves_of(schema: Any, value: Any, where: str = "") -> Iterator[Leaf]:
    """Every option below a dataclass, that of groups which are not chosen and of entries which are not there included."""
    for field in fields(schema):
        path = f"{where}.{field.name}" if where else field.name
        inner = getattr(value, field.name, None)
        kind = field.type
        if get_origin(kind) is UnionType:
            (kind,) = [choice for choice in get_args(kind) if choice is not NoneType]
        if is_dataclass(kind):
            yield from leaves_of(kind, inner, path)
            continue
        yield Leaf(path, kind, field.metadata.get("bounds", Bounds()))
        if get_origin(kind) is dict:
            of_each = get_args(kind)[1]
            if not is_dataclass(of_each):
                yield Leaf(path, of_each, Bounds(), entry=("fresh",))
                continue
            for name, item in (inner or {}).items():
                yield from leaves_of(of_each, item, f"{path}.{name}")
            for leaf in leaves_of(of_each, None):
                yield Leaf(path, leaf.kind, leaf.bounds, entry=("fresh", *leaf.path.split(".")))


@cache
def leaves(base: tuple[str, ...]) -> list[Leaf]:
    """The options of the configuration that these overrides compose."""
    return list(leaves_of(Config, composed(list(base))))


OPTIONS = [
    f"{group.name}=[{option}]" if group.name == "logger" else f"{group.name}={option}"
    for group in sorted(CONF.iterdir())
    if group.is_dir()
    for option in sorted(str(file.relative_to(group).with_suffix("")) for file in group.rglob("*.yaml"))
]


def rendered(value: Any) -> str:
    """A value as a command line has it."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return str(QuotedString(value.replace("${", "\\${"), Quote.double).with_quotes())
    if isinstance(value, list):
        return f"[{','.join(rendered(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{rendered(item)}' for name, item in value.items())}}}"
    return str(value)


WRITTEN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)  # as argv can hold it
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**32, 2**63, 10**30, 10**400, 1e-300, 1e300])
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | WRITTEN,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "path", "tokens"]), inner, max_size=2)
    ),
    max_leaves=4,
).map(rendered)
RAW = WRITTEN | st.sampled_from(
    ["", "???", "${seed}", "${nope}", "${", "1,2", "[", "{a", "choice(1,2)", "int(x)", "9" * 5000]
)


def right(kind: Any, bounds: Bounds) -> st.SearchStrategy[Any]:
    """Values of the right type, those at the ends of the bounds among them."""
    if get_origin(kind) is list:
        return st.lists(right(get_args(kind)[0], bounds), max_size=3)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return st.sampled_from([member.name for member in kind])
    if kind is bool:
        return st.booleans()
    if kind in (int, float):
        ends = [end for end in (bounds.above, bounds.at_least, bounds.below, bounds.at_most) if end is not None]
        close = st.integers(1, 64) if kind is int else st.floats(0, 4)
        return st.sampled_from([kind(end) for end in ends]) | close if ends else close
    if kind is str:
        return st.sampled_from(["embedded", "cpu", "law", "code", "auto", "last", "a b", "x" * 300]) | WRITTEN
    return st.just({})


def values(leaf: Leaf) -> st.SearchStrategy[str]:
    """Values of the right type as often as others."""
    return right(leaf.kind, leaf.bounds).map(rendered) | ANYTHING | RAW


@cache
def dense() -> DenseSource:
    return locate_dense("embedded")


@cache
def begins(base: tuple[str, ...]) -> bool:
    """Whether this machine and the embedded model and domains will do for a run of these options."""
    try:
        begin(composed(list(base)))
    except UserError:
        return False
    return True


def try_out(data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.sampled_from(OPTIONS), max_size=2, unique_by=lambda option: option.partition("=")[0]))
    base = tuple(drawn)
    try:
        known = leaves(base)
    except UserError:  # the option asks for a path, or for another option
        base, known = (), leaves(())
    chosen = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=2, unique_by=lambda leaf: leaf.path))
    overrides = [leaf.override(data.draw(values(leaf))) for leaf in chosen]
    try:
        config = composed([*base, *overrides])
        assert isinstance(config, Config)
        if begins(base):
            begin(config)
    except UserError as error:
        line = str(error)
        assert len(line.splitlines()) == 1, line
        assert any(names(line, leaf.path) for leaf in chosen), f"{line} names none of {overrides}"


READ_BY = {
    "samples": ("calibration_domains.samples",),
    "group_samples": ("calibration_domains.group_samples",),
    "refinement_steps": ("moe.refined.steps",),
    "refinement_batch": ("moe.refined.batch",),
    "length": ("retrain.length", "eval.lengths"),
    "windows": ("eval.windows",),
    "questions": ("eval.task_limit",),
}
"""{figure of a budget: options that are it where nobody says otherwise, and that messages name}; others are stages'."""


def names(line: str, path: str) -> bool:
    """Whether a message names an option, or what it is part of, or what has its value from it."""
    parts = path.split(".")
    ways = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    if parts[0] == "budget":
        ways += READ_BY.get(parts[-1], ("retrain",))
    return any(re.search(rf"(?<![\w.]){re.escape(way)}(?!\w)", line) for way in ways)


def begin(config: Config) -> None:
    """What a run does before it reads weights and texts: plan, table of the plan, whether there is room, checks."""
    embedded = locate_architecture(ModelConfig(name="tiny", path="embedded"))
    planned = plan(config, config.model.architecture or embedded)
    room = Capacity(host=1e9, device=1e9, store=1e7, outputs=1e6)
    assert full_text(planned, room)
    assert all(len(line.splitlines()) == 1 for line in shortages(planned, room))
    check(config, dense())


FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@given(data=st.data())
@settings(FUZZ, max_examples=30)
def test_any_value_of_an_option_is_taken_or_named(data: st.DataObject) -> None:
    try_out(data)


@pytest.mark.slow
@given(data=st.data())
@settings(FUZZ, max_examples=150)
def test_many_values_of_options_are_taken_or_named(data: st.DataObject) -> None:
    try_out(data)


def test_every_number_has_bounds() -> None:
    bare = [leaf.path for leaf in leaves(()) if is_number(leaf.kind) and leaf.bounds == Bounds()]
    assert not bare


def is_number(kind: Any) -> bool:
    return kind in (int, float) or (get_origin(kind) is list and is_number(get_args(kind)[0]))
