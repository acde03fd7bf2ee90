"""Quantization as pure functions of tensors: parameters from ranges, codes, and values from codes.

All arithmetic is FP32 with round half to even, on every dtype of input, so that codes can be compared with
``==`` across PyTorch, numpy and ONNX Runtime.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdexport.core.spec import NVFP4_BLOCK, QuantSpec
from qdexport.graph.dialect import LOG2_ZERO

__all__ = [
    "SQRT_HALF",
    "block_scales",
    "dequantize",
    "e2m1_bits",
    "e2m1_round",
    "e4m3_round",
    "fake_quantize_reference",
    "log2_codes",
    "log2_fake_quantize",
    "log2_inside",
    "nvfp4_codes",
    "nvfp4_fake_quantize",
    "parameters_from_range",
    "quantize_codes",
    "weight_scale_like",
]

# A channel that is all zero has no range; any positive scale codes it exactly.
# One such channel must not touch the others.
_UNIT_RANGE = 1.0
_E4M3_MAX = 448.0
_E2M1_MAX = 6.0
# of FP32: the bound between two codes of the logarithmic quantizer; a number, since tracing has no place for a tensor
SQRT_HALF = float(torch.tensor(0.5).sqrt())


def parameters_from_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover ``[low, high]`` (which is widened to hold 0, so that 0 is exact).

    Symmetric, signed (every format): ``scale = max(|low|, |high|) / qmax``, zero point 0; for NVFP4 ``qmax`` times 448,
    the largest scale of a block. Symmetric, unsigned: ``scale = high / qmax``.
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
        most = spec.qmax * _E4M3_MAX if spec.format == "nvfp4" else spec.qmax
        scale = torch.where(reach > 0, reach, _UNIT_RANGE) / most
        return _positive(scale), torch.zeros_like(low, dtype=torch.float32)
    width = high64 - low64
    scale = torch.where(width > 0, width, _UNIT_RANGE) / (spec.qmax - spec.qmin)
    zero_point = (spec.qmin - low64 / scale).round().clamp(spec.qmin, spec.qmax)
    return _positive(scale), zero_point.float()


def _positive(scale: Tensor) -> Tensor:
    # a subnormal scale would overflow its reciprocal in the engine
    return scale.float().clamp(min=torch.finfo(torch.float32).tiny)


def quantize_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, form: str = "int"
) -> Tensor:
    """Codes as FP32 values: ``clip(rint(x / scale) + zero_point, qmin, qmax)``, or of ``form`` fp8 the nearest E4M3
    number to ``x / scale``; scale broadcasts against ``x``.
    """
    if form == "fp8":
        return e4m3_round(x.float() / scale)
    return (x.float() / scale).round_().add_(zero_point).clamp_(qmin, qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values of codes: ``(codes - zero_point) * scale`` in FP32."""
    return (codes - zero_point) * scale


def fake_quantize_reference(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, form: str = "int"
) -> Tensor:
    """Quantizes and dequantizes with broadcasting parameters; the result has the dtype of ``x``."""
    # in place: bounds shifted by the zero point would spare two passes, but tensor bounds cost more
    codes = quantize_codes(x, scale, zero_point, qmin, qmax, form)
    return codes.sub_(zero_point).mul_(scale).to(x.dtype)


def weight_scale_like(scale: Tensor, weight: Tensor) -> Tensor:
    """A weight's scales in a shape that broadcasts against it.

    Args:
        scale: ``[1]``, ``[1, N]`` per output channel, or ``[1, N, B]`` for B blocks of the input dimension each.
        weight: ``[N, ...]``; ``[N, K]`` with K a multiple of B for blocks.
    """
    if scale.dim() == 3:
        return scale[0].repeat_interleave(weight.shape[1] // scale.shape[2], dim=1)
    return scale.reshape((-1, *[1] * (weight.dim() - 1)))


def e4m3_round(values: Tensor) -> Tensor:
    """The nearest E4M3 numbers (FP8 of OCP, without infinities), half to even; beyond 448 the largest; FP32."""
    return values.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()


def e2m1_round(values: Tensor) -> Tensor:
    """The nearest E2M1 numbers (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), half to even; beyond 6 the largest."""
    clipped = values.clamp(-_E2M1_MAX, _E2M1_MAX)
    size = clipped.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (clipped / step).round() * step


def e2m1_bits(values: Tensor) -> Tensor:
    """The four bits of E2M1 numbers, sign first, as INT8 whose upper half repeats the sign (-8 to 7)."""
    size = values.abs()
    # 0, 0.5, 1, 1.5, 2, 3, 4, 6 are numbered in order
    index = torch.where(size < 2, size * 2, torch.where(size < 4, size + 2, size / 2 + 4))
    return (index - 8 * values.signbit()).to(torch.int8)


def block_scales(x: Tensor, scale: Tensor) -> Tensor:
    """NVFP4's scales of blocks of 16 along the last dimension: ``e4m3(max |x| / 6 / scale)``.

    Args:
        x: ``[..., K]``, K a multiple of 16.
        scale: the scale of the tensor, FP32, one element.

    Returns:
        FP32 ``[..., K / 16, 1]``.
    """
    blocks = _in_blocks(x)
    return e4m3_round(blocks.abs().amax(dim=-1, keepdim=True) / _E2M1_MAX / scale.reshape(()))


def _in_blocks(x: Tensor) -> Tensor:
    return x.float().reshape(*x.shape[:-1], -1, NVFP4_BLOCK)


def nvfp4_fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """``q b scale`` with ``q`` of :func:`nvfp4_codes` and ``b`` of :func:`block_scales`; like ``x``."""
    wide = block_scales(x, scale) * scale.reshape(())
    return (nvfp4_codes(x, scale).reshape(*wide.shape[:-1], NVFP4_BLOCK) * wide).flatten(-2).to(x.dtype)


def nvfp4_codes(x: Tensor, scale: Tensor) -> Tensor:
    """``e2m1(x / (b scale))`` with ``b`` of :func:`block_scales`, FP32; 0 where a block's ``b`` is 0."""
    wide = block_scales(x, scale) * scale.reshape(())
    return torch.where(wide > 0, e2m1_round(_in_blocks(x) / wide), 0.0).flatten(-2)


def log2_codes(x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Codes of the logarithmic quantizer as FP32 values: ``clip(rint(-log2(x / scale)), 0, qmax)``; ``qmax`` for
    ``x <= 0``.

    Read off the binary exponent, so that no logarithm is rounded and every implementation can have equal codes: with
    ``x / scale = m 2^e`` and ``m`` in [1/2, 1) the code is ``-e``, and one more where ``m`` is below the square root of
    1/2.
    """
    mantissa, exponent = torch.frexp(x.float() / scale)
    codes = torch.where(mantissa < SQRT_HALF, 1 - exponent, -exponent).clamp_(0, qmax)
    return torch.where(mantissa > 0, codes, qmax).float()


def log2_fake_quantize(x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """``scale * 2^-q`` with ``q`` of :func:`log2_codes` (TCAQ-DM's post-softmax quantizer); 0 for the top code and for
    codes from ``LOG2_ZERO`` on, whose powers FP32 has no normal numbers for.
    """
    codes = log2_codes(x, scale, qmax)
    return torch.where(codes < min(qmax, LOG2_ZERO), scale * torch.exp2(-codes), 0.0).to(x.dtype)


def log2_inside(x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Where :func:`log2_fake_quantize` follows ``x``: neither 0, nor clipped at code 0."""
    clipped = x.float() / scale >= 2 * SQRT_HALF
    return (log2_codes(x, scale, qmax) < min(qmax, LOG2_ZERO)) & ~clipped
