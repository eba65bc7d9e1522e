"""Bounds of numbers."""

import math
import re
from dataclasses import dataclass, field

import pytest

from dive.bounds import bounded, check_bounds
from dive.errors import UserError


@dataclass(kw_only=True)
class Inner:
    share: float = bounded(0.5, at_least=0, below=1)
    limit: int | None = bounded(None, at_least=1, at_most=10)
    free: float = 0.0


@dataclass(kw_only=True)
class Outer:
    lengths: list[int] = bounded(default_factory=lambda: [8], at_least=2)
    named: dict[str, Inner] = field(default_factory=dict)
    inner: Inner | None = None
    flag: bool = True
    names: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Outer(inner=Inner(share=1.0)), "group.inner.share (1.0) must be at least 0 and below 1"),
        (Outer(inner=Inner(share=math.nan)), "group.inner.share (nan) must be at least 0 and below 1"),
        (Outer(inner=Inner(free=math.inf)), "group.inner.free (inf) must be finite"),
        (
            Outer(named={"a": Inner(), "b": Inner(limit=0)}),
            "group.named.b.limit (0) must be at least 1 and at most 10, or null",
        ),
        (Outer(lengths=[4, 1]), "group.lengths[1] (1) must be at least 2"),
        (Outer(lengths=[[4]]), "group.lengths[0] must be a whole number, not a list"),  # type: ignore[list-item]
        (Outer(names=[{"a": 1}]), "group.names[0] must be text, not a dict"),  # type: ignore[list-item]
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_number_out_of_bounds_is_named_by_its_whole_path(value: Outer, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_bounds(value, "group")


def test_what_lies_in_its_bounds_passes() -> None:
    check_bounds(Outer(named={"a": Inner(share=0.0, limit=10)}, inner=Inner(limit=None), lengths=[2, 10**400]))
