"""Clipping ranges of least error: how far the two ends of a range are drawn in before it is quantized.

The error of a range is ``sum |x - Q(x)|^p`` with the very scale and zero point the quantizer will have.
Ratios run from 0.2 to 1, where 1 keeps min-max. The search goes from coarse to fine: first ratios spread over
the whole span, then ratios between the neighbours of the best one, so that ``observer.grid`` equally spaced
ratios are resolved with far fewer evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qdexport.core.spec import Granularity, ObserverSpec, QuantSpec
from qdexport.quant.affine import e4m3_round, parameters_from_range

__all__ = ["Histogram", "activation_range_of_least_error", "histogram_range_of_least_error", "weight_range"]

_SMALLEST_RATIO = 0.2
_REFINEMENTS = 9  # ratios of the fine stage: the coarse best, and four on either side

_NARROW_BIN = 0.25  # of the scale: the error at the middle stands for a whole bin

# values of a weight searched at once: what stays in a core's cache is done in a third of the time
_BLOCK_VALUES = 1 << 17


def weight_range(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The range that a weight's quantizer covers.

    Args:
        weight: ``[C, ...]`` of any floating dtype; temporaries are of this one layer and FP32.
        spec: per channel, per block or per tensor; observer ``minmax`` or ``mse``.

    Returns:
        FP32 low and high, ``[C]`` per channel, ``[C * K / block]`` per block of a weight ``[C, K]``, or ``[1]``.

    Raises:
        ValueError: an observer that weights do not have.
    """
    if spec.block_size is not None:
        rows = weight.detach().reshape(-1, spec.block_size)
    elif spec.granularity is Granularity.PER_CHANNEL:
        rows = weight.detach().flatten(1)
    else:
        rows = weight.detach().reshape(1, -1)
    low, high = (end.float() for end in torch.aminmax(rows, dim=1))
    if spec.observer.kind == "minmax":
        return low, high
    if spec.observer.kind != "mse":
        raise ValueError(f"weights have the observers minmax and mse, not {spec.observer.kind}")
    block = max(1, _BLOCK_VALUES // rows.shape[1])
    blocks = zip(torch.split(rows, block), torch.split(low, block), torch.split(high, block), strict=True)
    ratio = torch.cat([_best_ratio_per_channel(values, first, last, spec) for values, first, last in blocks])
    return low * ratio, high * ratio


def activation_range_of_least_error(values: Tensor, low: float, high: float, spec: QuantSpec) -> tuple[float, float]:
    """The range of least error for a sample of an activation.

    A symmetric quantizer has one ratio for both ends, an asymmetric one a ratio for each end.

    Args:
        values: FP32 ``[N]``, a sample.
        low: the exact smallest value.
        high: the exact largest value.
        spec: the quantizer.

    Returns:
        Low and high of the range.
    """
    return _best_ends(lambda scale, zero: _power_error(values[None], scale, zero, spec).sum(dim=1), low, high, spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counted values: FP64 ``[B]`` each, only bins that hold something.

    Attributes:
        middle: of every bin; 0 for the one around 0.
        width: of every bin.
        count: values in it.
    """

    middle: Tensor
    width: Tensor
    count: Tensor


def histogram_range_of_least_error(values: Histogram, low: float, high: float, spec: QuantSpec) -> tuple[float, float]:
    """The range of least error for all values of an activation, as :func:`activation_range_of_least_error`.

    A bin that is narrow beside the scale is quantized at its middle. One that is not is spread over several codes: the
    rounding errors of its values are uniform in half a scale either way, ``E |e|^p = (s / 2)^p / (p + 1)``.
    """
    middle = values.middle.clamp(min(low, 0.0), max(high, 0.0))

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        s, z = scale.double(), zero_point.double()
        if spec.format == "fp8":
            unclipped, codes = middle / s, e4m3_round((middle / s).float()).double()
        else:
            unclipped = (middle / s).round_().add_(z)
            codes = unclipped.clamp(spec.qmin, spec.qmax)
        p = spec.observer.exponent
        at_middle = codes.sub(z).mul_(s).sub_(middle)
        exact = at_middle.square_() if p == 2.0 else at_middle.abs_().pow_(p)
        # the steps of fp8 are narrower than its scale nearly everywhere, and as bins have equal relative width
        spread = (unclipped == codes) & (values.width > s * _NARROW_BIN) & (spec.format == "int")
        each = torch.where(spread, (s / 2) ** p / (p + 1), exact)
        return each @ values.count

    return _best_ends(error, low, high, spec)


def _best_ends(
    error: Callable[[Tensor, Tensor], Tensor], low: float, high: float, spec: QuantSpec
) -> tuple[float, float]:
    """Searches from coarse to fine; ``error`` gives one number per candidate for scales and zero points ``[K, 1]``."""
    ends = torch.tensor([min(low, 0.0), max(high, 0.0)], dtype=torch.float64)

    def least(candidates: Tensor) -> Tensor:
        ranges = candidates * ends
        scale, zero_point = parameters_from_range(ranges[:, 0], ranges[:, 1], spec)
        return candidates[int(error(scale[:, None], zero_point[:, None]).argmin())]

    span = torch.linspace(1, _SMALLEST_RATIO, _coarse_ratios(spec.observer, spec.symmetric), dtype=torch.float64)
    best = least(_pairs(span, span, spec.symmetric))
    step = float(span[0] - span[1])
    low_fine, high_fine = _around(float(best[0]), step), _around(float(best[1]), step)
    best = least(torch.cat([best[None], _pairs(low_fine, high_fine, spec.symmetric)]))  # the coarse best wins a tie
    return float(ends[0] * best[0]), float(ends[1] * best[1])


def _coarse_ratios(observer: ObserverSpec, single: bool) -> int:
    """Ratios per end in the coarse stage; a search over one ratio can afford twice as many as one over
    pairs.
    """
    return max(2, math.ceil(math.sqrt(observer.grid)) * (2 if single else 1))


def _around(best: float, step: float) -> Tensor:
    offsets = torch.linspace(-step, step, _REFINEMENTS, dtype=torch.float64)
    return (best + offsets).clamp(_SMALLEST_RATIO, 1)


def _pairs(low: Tensor, high: Tensor, symmetric: bool) -> Tensor:
    """Candidates ``[K, 2]``: ratios of the low and the high end."""
    return torch.stack([low, low], dim=1) if symmetric else torch.cartesian_prod(low, high)


def _best_ratio_per_channel(rows: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    values = rows.float()
    span = torch.linspace(1, _SMALLEST_RATIO, _coarse_ratios(spec.observer, single=True), device=rows.device)
    step = float(span[0] - span[1])
    best_ratio = torch.ones_like(low)
    best_error = torch.full_like(low, torch.inf)

    def try_ratio(ratio: Tensor) -> None:
        nonlocal best_ratio, best_error
        scale, zero_point = parameters_from_range(low * ratio, high * ratio, spec)
        candidate = _power_error(values, scale[:, None], zero_point[:, None], spec).sum(dim=1)
        better = candidate < best_error
        best_ratio = torch.where(better, ratio, best_ratio)
        best_error = torch.where(better, candidate, best_error)

    for ratio in span:
        try_ratio(ratio.expand_as(low))
    centre = best_ratio
    for offset in torch.linspace(-step, step, _REFINEMENTS, device=rows.device):
        try_ratio((centre + offset).clamp(_SMALLEST_RATIO, 1))
    return best_ratio


def _power_error(values: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    if spec.format == "fp8":
        error = e4m3_round(values / scale).mul_(scale).sub_(values)
        return error.square_() if spec.observer.exponent == 2.0 else error.abs_().pow_(spec.observer.exponent)
    codes = (values / scale).round_()
    if spec.symmetric:  # the zero point is 0
        error = codes.clamp_(spec.qmin, spec.qmax).mul_(scale).sub_(values)
    else:
        error = codes.add_(zero_point).clamp_(spec.qmin, spec.qmax).sub_(zero_point).mul_(scale).sub_(values)
    if spec.observer.exponent == 2.0:
        return error.square_()
    return error.abs_().pow_(spec.observer.exponent)
