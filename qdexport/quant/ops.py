"""The operator ``qdexport::fake_quantize``: one node that carries a quantizer through ``torch.export``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qdexport.quant.affine import (
    e4m3_round,
    fake_quantize_reference,
    log2_fake_quantize,
    log2_inside,
    nvfp4_fake_quantize,
    weight_scale_like,
)

__all__ = ["NO_AXIS", "fake_quantize", "parameters_like"]

NO_AXIS = -1  # the quantizer has one scale per tensor


@torch.library.custom_op("qdexport::fake_quantize", mutates_args=())
def fake_quantize(  # noqa: PLR0913  an operator has no dataclass
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    mode: Tensor | None = None,
    form: str = "int",
) -> Tensor:
    """Quantizes and dequantizes: ``y = (clip(rint(x / s) + z, qmin, qmax) - z) * s`` in FP32, half to even.

    Args:
        x: any floating dtype and shape; samples along dimension 0 when ``row`` has more than one entry.
        scale: FP32, positive, ``[R]`` (one scale per tensor), ``[R, C]`` (C channels along ``axis``); R table rows;
            or ``[1, C, B]`` for a weight ``[C, K]`` with B blocks of K / B along its last dimension.
        zero_point: FP32, integer valued, same shape as ``scale``.
        row: INT64 ``[1]`` or ``[N]`` (one row per sample); None when R is 1.
        qmin: smallest code.
        qmax: largest code.
        axis: channel axis of ``x``, or ``NO_AXIS``.
        form: what codes are: ``int``; ``fp8``, E4M3 numbers; ``nvfp4``, E2M1 numbers with scales of their own for
            blocks of 16 along the last dimension (then ``scale`` is ``[1]``).
        mode: FP32 ``[R]``, 0 for rows that are affine, 1 for rows that are logarithmic (``y = s 2^-q`` with ``q =
            clip(rint(-log2(x / s)), 0, qmax)``, and 0 for the top code); None for affine rows alone.

    Returns:
        A tensor like ``x``. The gradients are straight-through for ``x`` and those of LSQ+ for scale and zero
        point (EfficientDM's reference; Esser et al. 2020, Bhalgat et al. 2020), without LSQ's gradient scale.
    """
    if form == "nvfp4":
        return nvfp4_fake_quantize(x, scale)
    s, z = parameters_like(x, scale, zero_point, row, axis)
    if mode is None:
        return fake_quantize_reference(x, s, z, qmin, qmax, form)
    logarithmic = _logarithmic(x, mode, row)
    if bool(logarithmic.all()):
        return log2_fake_quantize(x, s, qmax)
    affine = fake_quantize_reference(x, s, z, qmin, qmax)
    return torch.where(logarithmic, log2_fake_quantize(x, s, qmax), affine) if bool(logarithmic.any()) else affine


@fake_quantize.register_fake
def _(  # noqa: PLR0913  as above
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    mode: Tensor | None = None,
    form: str = "int",
) -> Tensor:
    return torch.empty_like(x)


def _logarithmic(x: Tensor, mode: Tensor, row: Tensor | None) -> Tensor:
    """Which samples have a logarithmic row, in a shape that broadcasts against ``x``."""
    chosen = mode[:1] if row is None else mode[row]
    return (chosen == 1).reshape([-1] + [1] * (x.dim() - 1))


def parameters_like(
    x: Tensor, scale: Tensor, zero_point: Tensor, row: Tensor | None, axis: int = NO_AXIS
) -> tuple[Tensor, Tensor]:
    """Parameters of the selected rows, in a shape that broadcasts against ``x``."""
    if scale.dim() == 3:
        return weight_scale_like(scale, x), weight_scale_like(zero_point, x)
    if row is None:
        scale, zero_point = scale[:1], zero_point[:1]
    else:
        scale, zero_point = scale[row], zero_point[row]
    shape = [scale.shape[0]] + [1] * (x.dim() - 1)
    if axis != NO_AXIS:
        if axis == 0:  # rows cannot select per sample along the channel axis itself
            shape[0] = scale.shape[-1]
        else:
            shape[axis] = scale.shape[-1]
    return scale.reshape(shape), zero_point.reshape(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, row, qmin, qmax, axis, mode, form = inputs
    ctx.save_for_backward(x, scale, zero_point, row, mode)
    ctx.range_and_axis = (qmin, qmax, axis)
    ctx.form = form


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point, row, mode = ctx.saved_tensors
    qmin, qmax, axis = ctx.range_and_axis
    if ctx.form == "nvfp4":  # block scales follow the values: nothing is clipped, and no scale is learned
        return grad.float().to(x.dtype), None, None, None, None, None, None, None, None
    s, z = parameters_like(x, scale, zero_point, row, axis)
    ratio = x.float() / s
    nearest = e4m3_round(ratio) if ctx.form == "fp8" else ratio.round()
    code = ratio if ctx.form == "fp8" else nearest + z
    below, above = code < qmin, code > qmax
    inside = ~(below | above)
    wide = grad.float()
    wide_affine = wide
    if mode is not None:
        # a logarithmic row: d(s 2^-q)/dx = y / x, which is 1 up to the rounding; s cancels out of s 2^log2(x / s)
        logarithmic = _logarithmic(x, mode, row)
        inside = torch.where(logarithmic, log2_inside(x, s, qmax), inside)
        wide_affine = torch.where(logarithmic, 0, wide)
    grad_x = torch.where(inside, wide, 0).to(x.dtype)
    grad_scale = grad_zero = None
    if ctx.needs_input_grad[1]:
        bound = torch.where(below, qmin - z, qmax - z)
        local = torch.where(inside, nearest - ratio, bound)
        grad_scale = _reduce_to_rows(wide_affine * local, s, scale, row)
    if ctx.needs_input_grad[2]:
        grad_zero = _reduce_to_rows(torch.where(inside, 0, -wide_affine * s), s, scale, row)
    return grad_x, grad_scale, grad_zero, None, None, None, None, None, None


def _reduce_to_rows(elementwise: Tensor, broadcast: Tensor, table: Tensor, row: Tensor | None) -> Tensor:
    """Sums a gradient over what one scale covers, and adds it to the rows of the table that were used."""
    if table.dim() == 3:  # blocks
        return elementwise.reshape(*table.shape, -1).sum(dim=3)
    summed = elementwise.sum_to_size(broadcast.shape)
    rows = torch.zeros_like(table)
    if row is None:
        rows[:1] = summed.reshape(rows[:1].shape)
        return rows
    return rows.index_add(0, row, summed.reshape(row.shape[0], *table.shape[1:]))


fake_quantize.register_autograd(_backward, setup_context=_setup_context)
