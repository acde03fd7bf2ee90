"""Which row of a table a timestep means, where timesteps may be fractions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

__all__ = [
    "TOLERANCE", "distinct", "equal_reach", "nearest_row", "reach_of", "reaches", "row_at", "stretches", "whole_step",
]  # fmt: skip

# A pipeline in half precision rounds a timestep before it calls the denoiser, FLUX's twice: it divides by 1000, too.
# Each rounding to FP16 is at most 2^-11 of the number.
TOLERANCE = 2.0**-10
# Schedulers compute timesteps in FP32 from logarithms of noise levels: KDPM2 ancestral names one step 856.2857 and
# 856.2861; among its schedules of up to 100 steps such pairs are at most 0.0047 of 1000 apart.
_FP32_NOISE = 2.0**-16
_USUAL_SCALE = 1000.0


def reach_of(timestep: float, relative: float = TOLERANCE) -> float:
    """How far a rounded timestep may be from the one that it means."""
    return max(abs(timestep), 1.0) * relative


def equal_reach(timesteps: Iterable[float]) -> float:
    """How far apart two timesteps of a schedule are the same one but for the rounding of the scheduler."""
    return max((abs(step) for step in timesteps), default=_USUAL_SCALE) * _FP32_NOISE


def reaches(timesteps: Sequence[float], rounding: float) -> list[float]:
    """How far from each row's timestep one may be that means it.

    Args:
        timesteps: one per row.
        rounding: of a pipeline, as a share of the timestep; 0 where pipelines pass timesteps on as they are.
    """
    least = equal_reach(timesteps)
    return [max(reach_of(step, rounding), least) for step in timesteps]


def distinct(timesteps: Iterable[float]) -> tuple[float, ...]:
    """The timesteps in their order, without those that an earlier one equals but for rounding."""
    steps = list(timesteps)
    reach, kept = equal_reach(steps), list[float]()
    for step in steps:
        if all(abs(step - other) > reach for other in kept):
            kept.append(step)
    return tuple(kept)


def row_at(timesteps: Sequence[float], timestep: float, rounding: float) -> int | None:
    """The row of a time table that a compiled network reads at a timestep; None where it has none."""
    if not timesteps:
        return None
    steps = np.asarray(timesteps, np.float64)
    size = np.abs(steps)
    reach = np.maximum(np.maximum(size, 1.0) * rounding, size.max() * _FP32_NOISE)  # as `reaches`, for a thousand rows
    beyond = np.abs(steps - timestep) - reach
    row = int(beyond.argmin())
    return row if beyond[row] <= 0 else None


def whole_step(timestep: float) -> int | None:
    """The whole number that a timestep is, but for rounding; None for a fraction."""
    if not math.isfinite(timestep):
        return None
    nearest = round(timestep)
    return nearest if abs(timestep - nearest) <= _USUAL_SCALE * _FP32_NOISE else None


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
