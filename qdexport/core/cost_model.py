"""Predicted time and stored size of a layer: a roofline for one card of each compute capability.

A prediction ranks plans; it is no measurement. A kernel takes the longer of its arithmetic at peak rate and its bytes
at peak bandwidth; what neighbouring layers fuse or keep in the cache is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qdexport.core.bit_plan import FLOAT_BITS, check_width
from qdexport.core.gpus import Gpu, gpu_named
from qdexport.core.precision import LayerKind
from qdexport.core.target import Target
from qdexport.errors import RecipeError

__all__ = ["CARDS", "LayerShape", "capabilities_of", "predicted_seconds", "stored_bytes"]

_INT4_BITS = 4
_SCALE_BYTES = 4  # FP32, one per output channel


# the representative of each compute capability that an engine can be built for
CARDS: dict[str, Gpu] = {gpu.capability: gpu for gpu in map(gpu_named, ("a100", "rtx-3090", "rtx-4090", "rtx-5090"))}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Sizes of one layer in one denoiser call.

    Attributes:
        name: torch module path.
        kind: only linear layers can be stored as INT4.
        macs: multiply-accumulates.
        weights: elements of the weight.
        channels: output channels.
        inputs: elements read.
        outputs: elements written.
    """

    name: str
    kind: LayerKind
    macs: int
    weights: int
    channels: int
    inputs: int
    outputs: int


def capabilities_of(target: Target, wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """The compute capabilities that times are predicted for.

    Args:
        target: its default ones are taken when none are asked for; all known ones when it has no default.
        wanted: what the recipe asks for.

    Raises:
        RecipeError: one is not in the table.
    """
    chosen = tuple(wanted or target.default_compute_capabilities or CARDS)
    unknown = [capability for capability in chosen if capability not in CARDS]
    if unknown:
        raise RecipeError(
            f"no rates are known for compute capability {unknown[0]}; the cost model has {', '.join(CARDS)}"
        )
    return chosen


def stored_bytes(shape: LayerShape, bits: int, *, int4_linear: bool, body_bytes: int = 2) -> int:
    """Bytes of a layer's weight in the engine: INT4, the INT8 carrier, or the body's type; with scales.

    Args:
        shape: the layer.
        bits: of the weight; 16 is floating point.
        int4_linear: whether the target stores linear weights of up to 4 bits as INT4.
        body_bytes: of a floating-point number of the body.
    """
    if check_width(bits) == FLOAT_BITS:
        return shape.weights * body_bytes
    scales = shape.channels * _SCALE_BYTES
    if _is_int4(shape, bits, int4_linear):
        return (shape.weights + 1) // 2 + scales
    return shape.weights + scales


def predicted_seconds(
    shape: LayerShape, bits: int, capability: str, *, int4_linear: bool, body_bytes: int = 2
) -> float:
    """Predicted time of one call of a layer on the representative card of a compute capability.

    INT8 has one kernel: it reads codes of input and weight and writes the body's type. Every width below 8 travels in
    the INT8 carrier, so it takes the same time. A weight stored as INT4 costs more time, not less: TensorRT-RTX runs a
    cast before each product, which reads 4-bit and writes 8-bit codes.

    Args:
        shape: the layer.
        bits: of the weight (activations are INT8 codes then); 16 is floating point.
        capability: a key of ``CARDS``.
        int4_linear: whether the target stores linear weights of up to 4 bits as INT4.
        body_bytes: 2 for FP16, 4 for FP32 (computed as TF32).
    """
    card = CARDS[capability]
    operations = 2.0 * shape.macs
    if check_width(bits) == FLOAT_BITS:
        rate = card.fp16 if body_bytes == 2 else card.fp16 / 2
        moved = (shape.inputs + shape.weights + shape.outputs) * body_bytes
        return max(operations / rate, moved / card.bandwidth)
    moved = shape.inputs + shape.weights + shape.outputs * body_bytes
    seconds = max(operations / card.int8, moved / card.bandwidth)
    if _is_int4(shape, bits, int4_linear):
        seconds += (shape.weights / 2 + shape.weights) / card.bandwidth
    return seconds


def _is_int4(shape: LayerShape, bits: int, int4_linear: bool) -> bool:
    return int4_linear and shape.kind == "linear" and bits <= _INT4_BITS
