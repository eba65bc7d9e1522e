"""Points of a curve by hand, at any interval."""

import math

import pytest
import torch

from dive.retrain.curve import Curve


def curve(steps: int) -> Curve:
    """Losses 1, 2, 3 …; one layer of two experts."""
    return Curve(
        loss=[float(n + 1) for n in range(steps)],
        learning_rate=[0.1 * (n + 1) for n in range(steps)],
        seconds=[2.0] * steps,
        load=[torch.tensor([[n / 10, 1 - n / 10]]) for n in range(steps)],
        entropy=[torch.tensor([float(n)]) for n in range(steps)],
    )


def test_points_are_means_since_the_one_before() -> None:
    first, last = curve(3).points(2, tokens=100, steps=3)
    assert (first["step"], first["tokens"]) == (2, 200)
    assert first["loss"] == pytest.approx(1.5)
    assert first["perplexity"] == pytest.approx(math.exp(1.5))
    assert first["learning_rate"] == pytest.approx(0.2)
    assert first["tokens_per_second"] == pytest.approx(200 / 4)
    assert first["router_entropy/layer_00"] == pytest.approx(0.5)
    assert first["expert_load/layer_00/expert_0"] == pytest.approx(0.05)
    assert first["expert_load/layer_00/expert_1"] == pytest.approx(0.95)
    assert (last["step"], last["loss"]) == (3, 3.0)


def test_points_lie_at_multiples_and_at_the_end_of_the_stage_alone() -> None:
    assert [p["step"] for p in curve(7).points(3, tokens=1, steps=7)] == [3, 6, 7]
    assert [p["step"] for p in curve(7).points(3, tokens=1, steps=9)] == [3, 6]
    assert [p["step"] for p in curve(7).points(100, tokens=1, steps=7)] == [7]
    assert Curve().points(1, tokens=1, steps=3) == []
    assert curve(7).point(3, tokens=1) == curve(7).points(3, tokens=1, steps=7)[-1]


def test_perplexity_over_longer_intervals_is_that_of_all_their_tokens() -> None:
    every = curve(8).points(1, tokens=10, steps=8)
    (whole,) = curve(8).points(8, tokens=10, steps=8)
    assert whole["perplexity"] == pytest.approx(math.exp(sum(math.log(p["perplexity"]) for p in every) / 8))


@pytest.mark.parametrize("steps", [0, 4])
def test_it_survives_a_file(steps: int) -> None:
    read = Curve.of(curve(steps).tensors())
    assert read.points(2, tokens=5, steps=4) == curve(steps).points(2, tokens=5, steps=4)
    assert len(read) == steps
