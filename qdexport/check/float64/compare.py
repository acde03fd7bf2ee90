"""How far two tensors in float64 are apart: as a whole, and at the worst element."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qdexport.check.float64.halves import half_units
from qdexport.check.measure import WORST_DB

__all__ = ["Distance", "distance", "fingerprint", "row_distances"]


@dataclass(frozen=True, slots=True)
class Distance:
    """Two numbers for two tensors.

    Attributes:
        sqnr_db: infinity for equal tensors, ``WORST_DB`` where one is not finite or the shapes differ.
        worst: the largest ``|a - b| / (|a| + rms(a))``, less what a rounding may be off by; infinity where ``sqnr_db``
            is ``WORST_DB``.
    """

    sqnr_db: float
    worst: float


def distance(reference: Tensor, other: Tensor, roundings: int = 0) -> Distance:
    """The distance of ``other`` from ``reference``. NaN and infinity count as far, unless both have them alike.

    Args:
        reference: what is right.
        other: what is compared.
        roundings: half units of FP16 that an element may be off (:func:`~qdexport.check.float64.halves.half_units`).
    """
    if reference.shape != other.shape:
        return Distance(WORST_DB, math.inf)
    a, b = reference.to(torch.float64), other.to(torch.float64)
    if a.numel() == 0 or torch.equal(a, b):
        return Distance(math.inf, 0.0)
    difference = (a - b).abs_()
    noise, signal = float(difference.square().sum()), float(a.square().sum())
    if not math.isfinite(noise) or not math.isfinite(signal):
        return _distance_of_finite(a, b, roundings)
    if signal == 0.0:
        return Distance(WORST_DB, math.inf)
    rms = math.sqrt(signal / a.numel())
    beyond = _beyond(difference, a, roundings)
    return Distance(10.0 * math.log10(signal / noise), float((beyond / (a.abs() + rms)).max()))


def _beyond(difference: Tensor, a: Tensor, roundings: int) -> Tensor:
    """What is left of differences behind roundings of ``a``."""
    return difference if not roundings else (difference - roundings * half_units(a)).clamp_(min=0)


def _distance_of_finite(a: Tensor, b: Tensor, roundings: int) -> Distance:
    """Where both have the same NaN and infinities, the distance of the rest."""
    same = (a == b) | (a.isnan() & b.isnan())
    finite = a.isfinite() & b.isfinite()
    if not bool((same | finite).all()):
        return Distance(WORST_DB, math.inf)
    return distance(a[finite], b[finite], roundings)


def row_distances(reference: Tensor, other: Tensor, roundings: int = 0) -> Tensor:
    """The largest ``|a - b| / (|a| + rms(a))`` of every row, float64 ``[N]``; infinite where one is not finite.

    Roundings as :func:`distance`.
    """
    a, b = (item.to(torch.float64).reshape(item.shape[0], -1) for item in (reference, other))
    if a.shape != b.shape:
        return torch.full((len(a),), math.inf, dtype=torch.float64)
    size = a.abs() + a.square().mean(dim=1, keepdim=True).sqrt()
    difference = _beyond((a - b).abs(), a, roundings)
    apart = torch.where(difference == 0, 0.0, difference / size).amax(dim=1)
    return apart.nan_to_num(nan=math.inf)


def fingerprint(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """Equal for equal tensors, and for others practically never."""
    return tuple(tensor.shape), zlib.crc32(np.ascontiguousarray(tensor.numpy(force=True)).tobytes())
