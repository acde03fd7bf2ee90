"""What a quantizer is: format, width, sign, symmetry and granularity. The only place that knows ranges of codes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qdexport.core.precision import LayerKind

__all__ = [
    "BLOCK_SIZES",
    "NVFP4_BLOCK",
    "Granularity",
    "LayerPlan",
    "ObserverSpec",
    "QuantSpec",
    "layer_precision",
    "stores_int4",
    "weight_storage",
]

MIN_BITS, MAX_BITS = 2, 8
_INT4_BITS = 4
BLOCK_SIZES = (128, 64, 32, 16)
NVFP4_BLOCK = 16
_LARGEST = {"fp8": 448, "nvfp4": 6}  # finite numbers of E4M3 and E2M1
_WIDTH = {"fp8": 8, "nvfp4": 4}


class Granularity(StrEnum):
    """How many scales one tensor has."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"  # output channels, axis 0 of a weight
    PER_GROUP = "per_group"  # one for the weights of all layers that read one tensor (queries, keys, values)
    PER_BLOCK = "per_block"  # stretches of a linear layer's input dimension, for every output channel


class ObserverSpec(BaseModel):
    """How a range is estimated; methods.md section 5 names the kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["minmax", "ema_minmax", "percentile", "mse"] = "minmax"
    momentum: float = Field(default=0.95, gt=0, lt=1, description="ema_minmax: weight of the past")
    percentile: float = Field(default=99.99, gt=50, le=100, description="percentile: share kept, in percent")
    grid: int = Field(default=80, ge=2, description="mse: number of shrink factors tried")
    exponent: float = Field(default=2.4, gt=0, description="mse: power of the absolute error")


class QuantSpec(BaseModel):
    """One quantizer.

    ``int``: affine, ``code = clip(rint(x / scale) + zero_point, qmin, qmax)``. ``fp8``: the nearest E4M3 number to
    ``clip(x / scale, -448, 448)``, half to even. ``nvfp4``: the nearest E2M1 number to ``clip(x / (b g), -6, 6)`` with
    a scale ``b`` in E4M3 for 16 numbers each (of an activation: made at run time) and one FP32 scale ``g`` per tensor.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["int", "fp8", "nvfp4"] = "int"
    bits: int = Field(ge=MIN_BITS, le=MAX_BITS, description="of a code; fp8 has 8 and nvfp4 4, which need not be said")
    symmetric: bool = True
    signed: bool = True
    granularity: Granularity = Granularity.PER_TENSOR
    block_size: Literal[16, 32, 64, 128] | None = Field(
        default=None, description="per_block: inputs that share a scale; less where a layer's width is no multiple"
    )
    observer: ObserverSpec = ObserverSpec()

    @model_validator(mode="before")
    @classmethod
    def _know_width(cls, values: Any) -> Any:
        if isinstance(values, dict) and "bits" not in values and values.get("format") in _WIDTH:
            return {**values, "bits": _WIDTH[values["format"]]}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.granularity is Granularity.PER_BLOCK) != (self.block_size is not None):
            raise ValueError("granularity: per_block and block_size (128, 64, 32 or 16) come together")
        width = _WIDTH.get(self.format)
        if width is None:
            return self
        if self.bits != width:
            raise ValueError(f"format {self.format} has {width} bits: set bits to {width}")
        if not self.symmetric or not self.signed:
            raise ValueError(f"format {self.format} is symmetric and signed: remove symmetric and signed")
        if self.format == "fp8" and self.granularity is Granularity.PER_BLOCK:
            raise ValueError("format fp8 has one scale per tensor or per output channel, no blocks")
        blocks = self.granularity is not Granularity.PER_TENSOR or self.observer.kind != "minmax"
        if self.format == "nvfp4" and blocks:
            raise ValueError("format nvfp4 has blocks of 16 by definition: remove granularity, block_size and observer")
        return self

    @property
    def qmin(self) -> int:
        """Smallest code: an integer, or the least number of the format."""
        if self.format in _LARGEST:
            return -_LARGEST[self.format]
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        if self.format in _LARGEST:
            return _LARGEST[self.format]
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """What a recipe decided for one Conv2d or Linear of the denoiser.

    Attributes:
        name: torch module path inside the denoiser.
        kind: ``conv`` or ``linear``.
        weight: the weight's quantizer; None leaves the layer in floating point.
        activation: the input's quantizer; None leaves the product in floating point.
        folded: the layer depends on the timestep alone and becomes rows of a table.
        group: layers with one group name read one tensor and share its activation quantizer.
        splits: widths of the input-channel groups that have quantizers of their own; empty for one group.
        bos: the first token of the text bypasses the layer: its output is a constant (keys and values of text).
        channel_scale: input channels are divided by a factor each, and the weight's columns multiplied by it.
        macs: multiply-accumulates of one denoiser call at the recipe's shapes (0 when unknown).
        idle: no call reaches the layer; it counts in no average.
        why: the rule that decided.
    """

    name: str
    kind: LayerKind
    weight: QuantSpec | None
    activation: QuantSpec | None
    folded: bool = False
    group: str = ""
    splits: tuple[int, ...] = ()
    bos: bool = False
    channel_scale: bool = False
    macs: int = 0
    idle: bool = False
    why: str = ""

    @property
    def quantized(self) -> bool:
        """Whether both operands of the product are quantized, so that it is computed in a narrow type."""
        return self.weight is not None and self.activation is not None and not self.folded

    @property
    def quantizes_weight(self) -> bool:
        """Whether the weight is stored as codes, whatever the type of the product."""
        return self.weight is not None and not self.folded

    @property
    def weight_only(self) -> bool:
        """Whether the weight is stored as codes and the product computed in the type of the body."""
        return self.quantizes_weight and self.activation is None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names in coverage tables: the layer's own, or ``name#0``, ``name#1`` for a split layer."""
        if self.splits and self.quantized:
            return tuple(f"{self.name}#{index}" for index in range(len(self.splits)))
        return (self.name,)


def stores_int4(plan: LayerPlan, *, int4_linear: bool, int4_weight_only: bool = False) -> bool:
    """Whether a layer's weight is stored as INT4: linear and of at most 4 bits.

    Args:
        plan: the layer.
        int4_linear: whether INT4 weights may meet quantized inputs (then one scale per output channel).
        int4_weight_only: whether they may meet floating-point inputs.
    """
    if not plan.quantizes_weight or plan.kind != "linear" or plan.weight is None:
        return False
    if plan.weight.format != "int" or plan.weight.bits > _INT4_BITS:
        return False
    if plan.weight_only:
        return int4_weight_only
    return int4_linear and plan.weight.granularity is Granularity.PER_CHANNEL


def weight_storage(plan: LayerPlan, *, int4_linear: bool, int4_weight_only: bool) -> str:
    """The type that a layer's weight is stored in: ``int8``, ``int4``, ``fp8``, ``nvfp4``, or empty for floating point;
    arguments as :func:`stores_int4`.
    """
    if not plan.quantizes_weight or plan.weight is None:
        return ""
    if plan.weight.format != "int":
        return plan.weight.format
    narrow = stores_int4(plan, int4_linear=int4_linear, int4_weight_only=int4_weight_only)
    return "int4" if narrow else "int8"


def layer_precision(plan: LayerPlan, body: str, *, int4_linear: bool = False) -> str:
    """The compute type that a coverage table states for a layer: ``int8``, ``int4``, ``fp8``, ``nvfp4``, ``folded``, or
    the body's type (also where the weight alone is quantized).
    """
    if plan.folded:
        return "folded"
    if not plan.quantized or plan.weight is None:
        return body
    if plan.weight.format != "int":
        return plan.weight.format
    return "int4" if stores_int4(plan, int4_linear=int4_linear) else "int8"
