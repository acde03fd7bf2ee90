"""Integer codes as bytes: widths up to 4 two per byte, 5 to 8 one per byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdexport.core.spec import QuantSpec
from qdexport.quant.affine import quantize_codes
from qdexport.quant.modules import QuantSplitConv2d, WeightQuantizer, quantizer_pairs

__all__ = ["integer_codes", "pack_codes", "unpack_codes", "weight_codes"]

_NIBBLE_BITS = 4

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
    return np.concatenate(weight_codes(layer), axis=1)


def weight_codes(layer: nn.Module) -> list[Codes]:
    """As :func:`integer_codes`, one array per part of the layer."""
    pairs = quantizer_pairs(layer)
    weight = layer.get_parameter("weight")
    kernels = torch.split_with_sizes(weight, layer.splits, dim=1) if isinstance(layer, QuantSplitConv2d) else (weight,)
    return [_codes(kernel, quantizer) for kernel, (_, quantizer) in zip(kernels, pairs, strict=True)]


def _codes(weight: Tensor, quantizer: WeightQuantizer) -> Codes:
    shape = (-1, *[1] * (weight.dim() - 1))
    scale, zero_point = quantizer.scale.reshape(shape), quantizer.zero_point.reshape(shape)
    codes = quantize_codes(weight.detach(), scale, zero_point, quantizer.spec.qmin, quantizer.spec.qmax)
    dtype = torch.int8 if quantizer.spec.signed else torch.uint8
    array: Codes = codes.to(dtype).cpu().numpy()
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


def unpack_codes(packed: Codes, spec: QuantSpec, shape: tuple[int, ...]) -> Codes:
    """Inverse of :func:`pack_codes`.

    Raises:
        ValueError: the number of bytes or the type does not fit ``spec`` and ``shape``.
    """
    dtype = np.dtype(np.int8 if spec.signed else np.uint8)
    count = int(np.prod(shape))
    if spec.bits > _NIBBLE_BITS:
        if packed.dtype != dtype or packed.shape != shape:
            raise ValueError(f"{packed.dtype} {list(packed.shape)}, expected {dtype} {list(shape)}")
        return packed
    if packed.dtype != np.uint8 or packed.shape != ((count + 1) // 2,):
        raise ValueError(f"{packed.dtype} {list(packed.shape)}, expected uint8 [{(count + 1) // 2}]")
    flat = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1)[:count].view(dtype)
    if spec.signed:
        flat = (flat << _NIBBLE_BITS) >> _NIBBLE_BITS  # the nibble's sign fills the upper half
    return flat.reshape(shape)
