"""Which row of a table a timestep means, where timesteps may be fractions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["TOLERANCE", "nearest_row", "reach_of", "stretches"]

# A pipeline in half precision rounds a timestep before it calls the denoiser, FLUX's twice: it divides by 1000, too.
# Each rounding to FP16 is at most 2^-11 of the number.
TOLERANCE = 2.0**-10


def reach_of(timestep: float, relative: float = TOLERANCE) -> float:
    """How far a rounded timestep may be from the one that it means."""
    return max(abs(timestep), 1.0) * relative


def nearest_row(timesteps: Sequence[float], timestep: float, relative: float = TOLERANCE) -> int | None:
    """The row of a table whose timestep is meant: the equal one, else the nearest within the rounding of a pipeline.

    Args:
        timesteps: one per row, in any order.
        timestep: that of a call.
        relative: what counts as rounding, as a share of the timestep.

    Returns:
        None where no row is that near.
    """
    if not timesteps:
        return None
    row = min(range(len(timesteps)), key=lambda index: abs(timesteps[index] - timestep))
    return row if abs(timesteps[row] - timestep) <= reach_of(timesteps[row], relative) else None


def stretches(timesteps: Sequence[float], training_steps: int) -> list[tuple[float, float]]:
    """For each row of a table of scales, the first and the last timestep that reads it: those to which its own is the
    nearest. Half way between two, the row that comes first is read.

    Args:
        timesteps: one per row, all different, in any order.
        training_steps: timesteps are below it, or may be equal where they are fractions.
    """
    whole = all(float(step).is_integer() for step in timesteps)
    low, high = min(0.0, *timesteps), max(float(training_steps - whole), *timesteps)
    order = sorted(range(len(timesteps)), key=lambda row: timesteps[row])
    found = [(low, high)] * len(timesteps)
    for before, after in pairwise(order):
        middle = (timesteps[before] + timesteps[after]) / 2
        end, start = middle, middle
        if whole:
            end, start = float(math.floor(middle)), float(math.ceil(middle))
            if end == start:
                end, start = (end, start + 1) if before < after else (end - 1, start)
        found[before] = (found[before][0], end)
        found[after] = (start, found[after][1])
    return found
