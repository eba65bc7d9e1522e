"""Learning rate over a training."""

import math

from dive.config import Schedule


def learning_rate_share(step: int, *, steps: int, schedule: Schedule, warmup: float, floor: float) -> float:
    """Share of the peak learning rate at optimiser step ``step``, from 0: a linear rise, then constant or half a cosine.

    Args:
        steps: of the whole training.
        warmup: share of them in which the rate rises.
        floor: share of the peak at the end of the cosine.
    """
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    if schedule is Schedule.constant:
        return 1.0
    done = min(1.0, (step - rise) / max(1, steps - rise))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
