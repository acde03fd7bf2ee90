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


def advice(plan: LayerPlan, ranges: LayerRanges, weight_share: float, *, rows: int) -> tuple[str, str]:
    """What to change in the recipe, and a sentence that says why.

    The first change is named that at least halves the layer's error. Those that cost nothing at run time come first,
    then those that cost a multiplication, then wider codes.

    Args:
        plan: how the layer is quantized.
        ranges: what its quantizers see.
        weight_share: of the layer's error, 0 to 1; the rest is its input's.
        rows: of the table of its input's scales; 1 where all steps share one.
    """
    parts = f"{round(100 * weight_share)} % of it is its weight's, {round(100 * (1 - weight_share))} % its input's"
    for left, change, why in _changes(plan, ranges, weight_share, rows):
        if left <= _WORTH:
            return change, f"{parts}: {why}; a change there leaves {round(100 * left)} % at best"
    return "floating point", f"{parts}: leave the layer in floating point (a rule without weight and activation)"


def _changes(
    plan: LayerPlan, ranges: LayerRanges, weight: float, rows: int
) -> Iterable[tuple[float, str, str]]:
    """Each change: the part of the error that it leaves, its key in a recipe, and what it is."""
    inputs = 1 - weight
    if ranges.now > 0 and ranges.splits:
        left = weight + inputs * ranges.per_half / ranges.now
        yield left, "split_shortcuts: true", "the halves that it reads need quantizers of their own"
    if ranges.now > 0 and rows == 1:
        left, span = weight + inputs * ranges.per_step / ranges.now, ranges.highs / max(ranges.lows, 1e-30)
        yield left, "activation_rows: per_step", f"its input's range changes {_fold(span)} over the steps"
    if ranges.weight_now > 0:
        left = weight * ranges.weight_fitted / ranges.weight_now + inputs
        yield left, "weight.observer.kind: mse", "narrower ranges of its weight cost less than they save"
    if ranges.now > 0 and not plan.channel_scale:
        left = weight + inputs * ranges.per_channel / ranges.now
        yield left, "channel_scale", f"its input's range changes {_fold(ranges.channels)} from channel to channel"
    yield from _bits(plan, weight)


def _bits(plan: LayerPlan, weight: float) -> Iterable[tuple[float, str, str]]:
    specs = (plan.weight, plan.activation)
    narrow = [spec is not None and spec.format == "int" and spec.bits < _FULL for spec in specs]
    if narrow[0] and plan.weight is not None:
        yield 1 - weight, "weight.bits", f"{plan.weight.bits} bits are few for its weight"
    if narrow[1] and plan.activation is not None:
        yield weight, "activation.bits", f"{plan.activation.bits} bits are few for its input"
    if all(narrow):
        yield 0.0, "weight.bits, activation.bits", "both have few bits"


def _fold(ratio: float) -> str:
    return f"{min(ratio, 1e6):.2g}-fold"


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
