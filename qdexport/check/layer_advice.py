"""What would lower the error of one quantized layer: the cheapest change that halves it, by what its numbers say."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from qdexport.core.spec import Granularity, LayerPlan, QuantSpec
from qdexport.quant.affine import parameters_from_range
from qdexport.quant.modules import ActivationQuantizer, quantizer_pairs
from qdexport.quant.ops import NO_AXIS, fake_quantize

__all__ = ["LayerRanges", "advice", "ranges_of"]

# how far below the largest value a range may end: clipping a few values costs less than steps that are too wide
_REACHES: Final = (1.0, 0.85, 0.7, 0.55)
_WORTH: Final = 0.5  # a change is named when it leaves at most this part of a layer's error
_FULL: Final = 8


@dataclass(slots=True)
class LayerRanges:
    """Squared quantization error of what a layer reads, as it is and as it could be; and of its weight.

    Attributes:
        now: with the quantizer's own scale.
        per_step: with the best range of each call.
        per_channel: with a range for each channel.
        per_half: with a range for each of the halves that a shortcut reads.
        weight_now: of the weight.
        weight_fitted: of the weight with the best of some narrower ranges for each output channel.
        splits: channels of these halves; empty for other layers, and where they have quantizers of their own.
        lows: the largest magnitude in each call, the smallest of them.
        highs: the same, the largest.
        channels: the largest magnitude of any channel over that of the middle one.
    """

    now: float = 0.0
    per_step: float = 0.0
    per_channel: float = 0.0
    per_half: float = 0.0
    weight_now: float = 0.0
    weight_fitted: float = 0.0
    lows: float = float("inf")
    highs: float = 0.0
    channels: float = 1.0
    splits: tuple[int, ...] = ()

    def add_input(self, x: Tensor, quantizer: ActivationQuantizer, axis: int) -> None:
        """Takes what one input quantizer reads in one call."""
        spec, flat = quantizer.spec, x.float()
        if spec.format != "int":
            return
        self.now += _error(quantizer(x).float(), flat)
        self.per_step += _best(flat, spec, NO_AXIS)
        self.per_channel += _best(flat, spec, axis)
        if self.splits:
            halves = torch.split_with_sizes(flat, self.splits, dim=axis)
            self.per_half += math.fsum(_best(half, spec, NO_AXIS) for half in halves)
        by_channel = flat.abs().movedim(axis, 0).flatten(1).amax(dim=1)
        most = float(by_channel.max())
        self.lows, self.highs = min(self.lows, most), max(self.highs, most)
        middle = float(by_channel.median())
        self.channels = max(self.channels, most / middle if middle > 0 else 1.0)

    def add_weight(self, weight: Tensor, quantized: Tensor, spec: QuantSpec) -> None:
        """Takes a weight and what its quantizer makes of it."""
        self.weight_now += _error(quantized.float(), weight.float())
        if spec.format == "int" and spec.granularity is not Granularity.PER_BLOCK:
            self.weight_fitted += min(_error(quantized.float(), weight.float()), _best(weight.float(), spec, 0))
        else:
            self.weight_fitted += _error(quantized.float(), weight.float())


def ranges_of(layer: Any, splits: tuple[int, ...] = ()) -> LayerRanges:
    """What is known of a quantized layer before any call: its weight, and the halves that it could be split into."""
    found = LayerRanges(splits=splits)
    with torch.no_grad():
        for (_, quantizer), kernel in zip(quantizer_pairs(layer), layer.kernels(), strict=True):
            found.add_weight(kernel, quantizer(kernel), quantizer.spec)
    return found


def advice(plan: LayerPlan, ranges: LayerRanges, weight_share: float, *, rows: int) -> str:
    """One sentence: what dominates the layer's error, and the first change that at least halves it.

    Changes that cost nothing at run time come first, then those that cost a multiplication, then wider codes.

    Args:
        plan: how the layer is quantized.
        ranges: what its quantizers see.
        weight_share: of the layer's error, 0 to 1; the rest is its input's.
        rows: of the table of its input's scales; 1 where all steps share one.
    """
    weight, inputs = weight_share, 1 - weight_share
    what = f"{round(100 * weight)} % weight, {round(100 * inputs)} % input: "
    for left, text in _changes(plan, ranges, (weight, inputs), rows):
        if left <= _WORTH:
            return what + text
    return what + "leave it in floating point (a rule with `weight: null`)"


def _changes(
    plan: LayerPlan, ranges: LayerRanges, parts: tuple[float, float], rows: int
) -> Iterable[tuple[float, str]]:
    """Each change with the part of the error that it leaves."""
    weight, inputs = parts
    if ranges.now > 0 and rows == 1:
        left, span = ranges.per_step / ranges.now, ranges.highs / max(ranges.lows, 1e-30)
        yield weight + inputs * left, f"a row per step (`activation_rows: per_step`): {_span(span)} over the steps"
    if ranges.now > 0 and ranges.splits:
        left = ranges.per_half / ranges.now
        yield weight + inputs * left, "quantizers of their own for the halves that it reads (`split_shortcuts: true`)"
    if ranges.weight_now > 0:
        fitted = ranges.weight_fitted / ranges.weight_now
        yield weight * fitted + inputs, "ranges of least squared error for its weight (`weight.observer.kind: mse`)"
    if ranges.now > 0 and not plan.channel_scale:
        left = ranges.per_channel / ranges.now
        yield weight + inputs * left, f"channel scales (`channel_scale`): {_span(ranges.channels)} over its channels"
    yield from _bits(plan, weight, inputs)


def _bits(plan: LayerPlan, weight: float, inputs: float) -> Iterable[tuple[float, str]]:
    wide = [spec is None or spec.bits >= _FULL or spec.format != "int" for spec in (plan.weight, plan.activation)]
    if plan.weight is not None and not wide[0]:
        yield inputs, f"more bits for its weight ({plan.weight.bits} now)"
    if plan.activation is not None and not wide[1]:
        yield weight, f"more bits for its input ({plan.activation.bits} now)"
    if not any(wide):
        yield 0.0, "more bits for its weight and its input"


def _span(ratio: float) -> str:
    return f"its range changes {min(ratio, 1e6):.2g}-fold"


def _best(x: Tensor, spec: QuantSpec, axis: int) -> float:
    """Least squared error with one range for all values, or one for each index of an axis."""
    if axis == NO_AXIS:
        low, high = x.min().reshape(1), x.max().reshape(1)
    else:
        rows = x.movedim(axis, 0).flatten(1)
        low, high = rows.amin(dim=1)[None], rows.amax(dim=1)[None]
    errors = []
    for reach in _REACHES:
        scale, zero = parameters_from_range(reach * low, reach * high, spec)
        errors.append(_errors(fake_quantize(x, scale, zero, None, spec.qmin, spec.qmax, axis), x, axis))
    return float(torch.stack(errors).amin(dim=0).sum())


def _errors(a: Tensor, b: Tensor, axis: int) -> Tensor:
    """Squared errors in FP64, in all or for each index of an axis."""
    squares = (a - b).square()
    return squares.sum(dtype=torch.float64) if axis == NO_AXIS else squares.movedim(axis, 0).flatten(1).double().sum(1)


def _error(a: Tensor, b: Tensor) -> float:
    return float(_errors(a, b, NO_AXIS))
