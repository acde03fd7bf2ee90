"""How codes of any width and zero point travel in INT8."""

from __future__ import annotations

import numpy as np

from qdexport.core.precision import INT8_MAX, INT8_MIN

__all__ = ["carrier_offset"]


def carrier_offset(qmin: int, qmax: int, zero_points: np.ndarray) -> int | None:
    """The constant ``o`` with ``code - o`` in INT8, or None when ``o`` is the (per-row) zero point itself.

    Args:
        qmin: smallest code.
        qmax: largest code; ``qmax - qmin`` is at most 255.
        zero_points: integer valued, one per table row.

    Returns:
        None if ``qmin - z >= -128`` and ``qmax - z <= 127`` for every row (widths up to 7 always do); else the offset
        that centres the codes, 128 for unsigned 8-bit.
    """
    if bool(np.all(qmin - zero_points >= INT8_MIN) and np.all(qmax - zero_points <= INT8_MAX)):
        return None
    return qmin - INT8_MIN
