"""Affine quantization as pure functions of tensors: parameters from ranges, codes, and values from codes.

All arithmetic is FP32 with round half to even, on every dtype of input, so that codes can be compared with
``==`` across PyTorch, numpy and ONNX Runtime.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdexport.core.spec import QuantSpec
from qdexport.graph.dialect import LOG2_ZERO

__all__ = [
    "dequantize",
    "fake_quantize_reference",
    "log2_codes",
    "log2_fake_quantize",
    "log2_inside",
    "parameters_from_range",
    "quantize_codes",
]

# A channel that is all zero has no range; any positive scale codes it exactly.
# One such channel must not touch the others.
_UNIT_RANGE = 1.0
# of FP32: the bound between two codes of the logarithmic quantizer; a number, since tracing has no place for a tensor
_SQRT_HALF = float(torch.tensor(0.5).sqrt())


def parameters_from_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover ``[low, high]`` (which is widened to hold 0, so that 0 is exact).

    Symmetric, signed: ``scale = max(|low|, |high|) / qmax``, zero point 0. Symmetric, unsigned: ``scale =
    high / qmax``.
    Asymmetric: ``scale = (high - low) / (qmax - qmin)``, ``zero_point = clip(rint(qmin - low / scale), qmin,
        qmax)``.
    Computed in float64 and rounded once to FP32.

    Args:
        low: smallest values, any shape.
        high: largest values, same shape.
        spec: the quantizer.

    Returns:
        FP32 scale (positive) and FP32 integer-valued zero point, both of the shape of ``low``.

    Raises:
        ValueError: a bound is NaN or infinite; the caller knows the layer and says so to the user.
    """
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise ValueError("a range with NaN or infinite bounds has no scale")
    low64, high64 = low.double().clamp(max=0), high.double().clamp(min=0)
    if spec.symmetric:
        reach = torch.maximum(-low64, high64) if spec.signed else high64
        scale = torch.where(reach > 0, reach, _UNIT_RANGE) / spec.qmax
        return _positive(scale), torch.zeros_like(low, dtype=torch.float32)
    width = high64 - low64
    scale = torch.where(width > 0, width, _UNIT_RANGE) / (spec.qmax - spec.qmin)
    zero_point = (spec.qmin - low64 / scale).round().clamp(spec.qmin, spec.qmax)
    return _positive(scale), zero_point.float()


def _positive(scale: Tensor) -> Tensor:
    # a subnormal scale would overflow its reciprocal in the engine
    return scale.float().clamp(min=torch.finfo(torch.float32).tiny)


def quantize_codes(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Integer codes as FP32 values: ``clip(rint(x / scale) + zero_point, qmin, qmax)``; scale broadcasts
    against ``x``.
    """
    return (x.float() / scale).round_().add_(zero_point).clamp_(qmin, qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values of codes: ``(codes - zero_point) * scale`` in FP32."""
    return (codes - zero_point) * scale


def fake_quantize_reference(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Quantizes and dequantizes with broadcasting parameters; the result has the dtype of ``x``."""
    # in place: bounds shifted by the zero point would spare two passes, but tensor bounds cost more
    codes = quantize_codes(x, scale, zero_point, qmin, qmax)
    return codes.sub_(zero_point).mul_(scale).to(x.dtype)


def log2_codes(x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Codes of the logarithmic quantizer as FP32 values: ``clip(rint(-log2(x / scale)), 0, qmax)``; ``qmax`` for
    ``x <= 0``.

    Read off the binary exponent, so that no logarithm is rounded and every implementation can have equal codes: with
    ``x / scale = m 2^e`` and ``m`` in [1/2, 1) the code is ``-e``, and one more where ``m`` is below the square root of
    1/2.
    """
    mantissa, exponent = torch.frexp(x.float() / scale)
    codes = torch.where(mantissa < _SQRT_HALF, 1 - exponent, -exponent).clamp_(0, qmax)
    return torch.where(mantissa > 0, codes, qmax).float()


def log2_fake_quantize(x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """``scale * 2^-q`` with ``q`` of :func:`log2_codes` (TCAQ-DM's post-softmax quantizer); 0 for the top code and for
    codes from ``LOG2_ZERO`` on, whose powers FP32 has no normal numbers for.
    """
    codes = log2_codes(x, scale, qmax)
    return torch.where(codes < min(qmax, LOG2_ZERO), scale * torch.exp2(-codes), 0.0).to(x.dtype)


def log2_inside(x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Where :func:`log2_fake_quantize` follows ``x``: neither 0, nor clipped at code 0."""
    clipped = x.float() / scale >= 2 * _SQRT_HALF
    return (log2_codes(x, scale, qmax) < min(qmax, LOG2_ZERO)) & ~clipped
