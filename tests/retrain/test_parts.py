"""Parts of a corpus by hand."""

from itertools import islice

import pytest

from dive.retrain import parts
from dive.retrain.parts import parts_of, spans


def test_parts_double_up_to_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "FIRST", 8)
    monkeypatch.setattr(parts, "LARGEST", 40)
    assert list(islice(spans(4), 5)) == [range(2), range(2, 6), range(6, 14), range(14, 24), range(24, 34)]
    assert parts_of(range(6), 4) == [(0, range(2)), (1, range(2, 6))]
    assert parts_of(range(5, 7), 4) == [(1, range(2, 6)), (2, range(6, 14))]
    assert parts_of(range(3, 3), 4) == []
    assert list(islice(spans(1000), 2)) == [range(1), range(1, 2)]  # a block that is longer than a part
