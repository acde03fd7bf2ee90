"""Integer codes as bytes: widths up to 4 two per byte, 5 to 8 one per byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdexport.core.spec import QuantSpec
from qdexport.quant.affine import e2m1_bits, nvfp4_codes, quantize_codes, weight_scale_like
from qdexport.quant.modules import QuantConv2d, QuantLinear, QuantSplitConv2d, WeightQuantizer, quantizer_pairs

__all__ = ["integer_codes", "pack_codes", "packed_layout", "unpack_codes", "weight_codes", "weight_parts"]

_NIBBLE_BITS = 4
_BLOCK_VALUES = 1 << 17

Codes = NDArray[np.integer[Any]]


def integer_codes(layer: nn.Module) -> Codes:
    """The integer codes of a quantized layer's weight, in the weight's shape.

    Args:
        layer: a QuantConv2d, QuantLinear or QuantSplitConv2d (its parts side by side).

    Returns:
        int8 for signed codes, uint8 for unsigned ones.

    Raises:
        TypeError: the layer is not quantized.
    """
    return np.concatenate([weight_codes(kernel, quantizer) for kernel, quantizer in weight_parts(layer)], axis=1)


def weight_parts(layer: nn.Module) -> list[tuple[Tensor, WeightQuantizer]]:
    """The weight and its quantizer of each part of a quantized layer (one, unless it is split).

    Raises:
        TypeError: the layer is not quantized.
    """
    quantizers = [weights for _, weights in quantizer_pairs(layer)]
    if not isinstance(layer, QuantConv2d | QuantLinear | QuantSplitConv2d):
        raise TypeError(f"{type(layer).__name__} is not quantized")
    with torch.no_grad():
        return list(zip(layer.kernels(), quantizers, strict=True))


def weight_codes(weight: Tensor, quantizer: WeightQuantizer) -> Codes:
    """The codes of one weight, int8 or uint8 (FP8, FP4: bits); block by block, so that temporaries stay cached."""
    codes = torch.empty(weight.shape, dtype=torch.int8 if quantizer.spec.signed else torch.uint8)
    spec, scale, zero_point = quantizer.spec, quantizer.scale, quantizer.zero_point
    rows = max(1, _BLOCK_VALUES // max(1, weight[0].numel()))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        own = (slice(None), part) if scale.dim() > 1 else slice(None)
        values = weight[part]
        if spec.format == "nvfp4":
            codes[part] = e2m1_bits(nvfp4_codes(values, scale))
            continue
        block = quantize_codes(
            values,
            weight_scale_like(scale[own], values),
            weight_scale_like(zero_point[own], values),
            spec.qmin,
            spec.qmax,
            spec.format,
        )
        codes[part] = block.to(torch.float8_e4m3fn).view(torch.int8) if spec.format == "fp8" else block.to(codes.dtype)
    array: Codes = codes.numpy()
    return array


def pack_codes(codes: Codes, spec: QuantSpec) -> Codes:
    """The stored form of codes.

    Widths 2 to 4: two codes per byte along the flattened array, the first in the low nibble, negative codes
    in two's complement, an odd last one beside a 0; uint8, one dimension. Widths 5 to 8: the codes as they
    are.
    """
    if spec.bits > _NIBBLE_BITS:
        return codes
    flat = codes.reshape(-1).view(np.uint8) & 0xF
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[0::2] | (flat[1::2] << _NIBBLE_BITS)


def packed_layout(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of the stored form of codes of a weight of ``shape``."""
    if spec.bits > _NIBBLE_BITS:
        return np.dtype(np.int8 if spec.signed else np.uint8), shape
    return np.dtype(np.uint8), ((int(np.prod(shape)) + 1) // 2,)


def unpack_codes(packed: Codes, spec: QuantSpec, shape: tuple[int, ...]) -> Codes:
    """Inverse of :func:`pack_codes`.

    Raises:
        ValueError: the number of bytes or the type does not fit ``spec`` and ``shape``.
    """
    dtype, packed_shape = packed_layout(spec, shape)
    if packed.dtype != dtype or packed.shape != packed_shape:
        raise ValueError(f"{packed.dtype} {list(packed.shape)}, expected {dtype} {list(packed_shape)}")
    if spec.bits > _NIBBLE_BITS:
        return packed
    count = int(np.prod(shape))
    flat = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1)[:count]
    if spec.signed:
        flat = flat.view(np.int8)
        flat = (flat << _NIBBLE_BITS) >> _NIBBLE_BITS  # the nibble's sign fills the upper half
    return flat.reshape(shape)
