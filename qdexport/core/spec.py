"""What a quantizer is: width, sign, symmetry and granularity. The only place that knows integer ranges."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Granularity", "LayerPlan", "ObserverSpec", "QuantSpec", "layer_precision", "stores_int4"]

MIN_BITS, MAX_BITS = 2, 8
_INT4_BITS = 4


class Granularity(StrEnum):
    """How many scales one tensor has."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"  # output channels, axis 0 of a weight
    PER_GROUP = "per_group"  # one for the weights of all layers that read one tensor (queries, keys, values)


class ObserverSpec(BaseModel):
    """How a range is estimated; methods.md section 5 names the kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["minmax", "ema_minmax", "percentile", "mse"] = "minmax"
    momentum: float = Field(default=0.95, gt=0, lt=1, description="ema_minmax: weight of the past")
    percentile: float = Field(default=99.99, gt=50, le=100, description="percentile: share kept, in percent")
    grid: int = Field(default=80, ge=2, description="mse: number of shrink factors tried")
    exponent: float = Field(default=2.4, gt=0, description="mse: power of the absolute error")


class QuantSpec(BaseModel):
    """One affine quantizer: ``code = clip(rint(x / scale) + zero_point, qmin, qmax)``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(ge=MIN_BITS, le=MAX_BITS)
    symmetric: bool = True
    signed: bool = True
    granularity: Granularity = Granularity.PER_TENSOR
    observer: ObserverSpec = ObserverSpec()

    @property
    def qmin(self) -> int:
        """Smallest integer code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """What a recipe decided for one Conv2d or Linear of the denoiser.

    Attributes:
        name: torch module path inside the denoiser.
        kind: ``conv`` or ``linear``.
        weight: the weight's quantizer; None leaves the layer in floating point.
        activation: the input's quantizer; None leaves the layer in floating point.
        folded: the layer depends on the timestep alone and becomes rows of a table.
        group: layers with one group name read one tensor and share its activation quantizer.
        splits: widths of the input-channel groups that have quantizers of their own; empty for one group.
        bos: the first token of the text bypasses the layer: its output is a constant (keys and values of text).
        channel_scale: input channels are divided by a factor each, and the weight's columns multiplied by it.
        macs: multiply-accumulates of one denoiser call at the recipe's shapes (0 when unknown).
        why: the rule that decided.
    """

    name: str
    kind: Literal["conv", "linear"]
    weight: QuantSpec | None
    activation: QuantSpec | None
    folded: bool = False
    group: str = ""
    splits: tuple[int, ...] = ()
    bos: bool = False
    channel_scale: bool = False
    macs: int = 0
    why: str = ""

    @property
    def quantized(self) -> bool:
        """Whether the layer computes with integers."""
        return self.weight is not None and self.activation is not None and not self.folded

    @property
    def parts(self) -> tuple[str, ...]:
        """Names in coverage tables: the layer's own, or ``name#0``, ``name#1`` for a split layer."""
        if self.splits and self.quantized:
            return tuple(f"{self.name}#{index}" for index in range(len(self.splits)))
        return (self.name,)


def stores_int4(plan: LayerPlan, *, int4_linear: bool) -> bool:
    """Whether a layer's weight is stored as INT4: linear, of at most 4 bits, where the target computes with it."""
    return (
        int4_linear
        and plan.quantized
        and plan.kind == "linear"
        and plan.weight is not None
        and plan.weight.bits <= _INT4_BITS
        and plan.weight.granularity is Granularity.PER_CHANNEL
    )


def layer_precision(plan: LayerPlan, body: str, *, int4_linear: bool = False) -> str:
    """The compute type that a coverage table states for a layer: ``int8``, ``int4``, ``folded``, or the body's type."""
    if plan.folded:
        return "folded"
    if not plan.quantized:
        return body
    return "int4" if stores_int4(plan, int4_linear=int4_linear) else "int8"
