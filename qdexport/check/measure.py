"""Two numbers for two tensors: signal-to-quantization-noise ratio, and the share of differing codes."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["WORST_DB", "decibels", "flip_rate", "sqnr_db"]

# stands for "not comparable": a value is NaN or infinite, or there is noise without a signal
WORST_DB = -999.0
_SLICE = 1 << 20


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """``10 log10(sum(reference^2) / sum((reference - other)^2))`` in float64.

    Args:
        reference: any shape and floating type.
        other: the same shape.

    Returns:
        Decibels; infinity for equal tensors, ``WORST_DB`` where a value is not finite, the shapes differ, or
        there is noise without a signal.
    """
    if reference.shape != other.shape:
        return WORST_DB
    left, right = reference.reshape(-1), other.reshape(-1)
    signal = noise = 0.0
    # in slices, so that a large tensor is never held in float64
    for start in range(0, left.size, _SLICE):
        a = left[start : start + _SLICE].astype(np.float64)
        b = right[start : start + _SLICE].astype(np.float64)
        signal += float(np.vdot(a, a))
        np.subtract(a, b, out=b)
        noise += float(np.vdot(b, b))
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` of two sums of squares: infinity without noise, ``WORST_DB`` without a signal or
    where one is not finite.
    """
    if noise == 0.0:
        return math.inf
    if not math.isfinite(noise) or not math.isfinite(signal) or signal == 0.0:
        return WORST_DB
    return 10.0 * math.log10(signal / noise)


def flip_rate(reference: np.ndarray, other: np.ndarray) -> float:
    """The share of integer codes that differ; 1 when the shapes do."""
    if reference.shape != other.shape:
        return 1.0
    return float(np.count_nonzero(reference != other) / max(reference.size, 1))
