"""Which row of a table a timestep means, where timesteps may be fractions."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["TOLERANCE", "nearest_row", "reach_of"]

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
