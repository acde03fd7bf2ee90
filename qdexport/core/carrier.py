"""How codes of any width and zero point travel in INT8."""

from __future__ import annotations

import numpy as np

__all__ = ["carrier_offset"]

_INT8_MIN, _INT8_MAX = -128, 127


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
    if bool(np.all(qmin - zero_points >= _INT8_MIN) and np.all(qmax - zero_points <= _INT8_MAX)):
        return None
    return qmin - _INT8_MIN
