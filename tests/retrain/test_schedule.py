"""The learning rate over a training, worked out by hand."""

import pytest

from dive.config import Schedule
from dive.retrain.schedule import learning_rate_share


def test_the_cosine_rises_and_falls_to_its_floor() -> None:
    shares = [
        learning_rate_share(step, steps=100, schedule=Schedule.cosine, warmup=0.1, floor=0.2) for step in range(101)
    ]
    assert shares[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert shares[10] == 1.0
    assert shares[55] == pytest.approx(0.6)  # half-way down: 0.2 + 0.8 · (1 + cos 90°) / 2
    assert shares[100] == pytest.approx(0.2)
    assert shares[10:] == sorted(shares[10:], reverse=True)


def test_the_constant_stays_at_its_peak() -> None:
    shares = [
        learning_rate_share(step, steps=10, schedule=Schedule.constant, warmup=0.2, floor=0.0) for step in range(10)
    ]
    assert shares == [0.5, *[1.0] * 9]
