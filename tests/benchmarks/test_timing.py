"""Variants take turns, and ratios are taken within a round."""

import pytest

from benchmarks.timing import interleaved, machine, median_ratio


def test_variants_take_turns_after_one_untimed_round() -> None:
    calls: list[str] = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert "".join(calls) == "ab" * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_the_ratio_of_a_round_is_not_moved_by_a_slow_round() -> None:
    assert median_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == pytest.approx(2.0)
    assert "thread" in machine()
