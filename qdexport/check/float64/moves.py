"""ONNX operators that move, make or convert numbers, on tensors in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from qdexport.check.float64.operands import (
    WIDE,
    Attributes,
    Inputs,
    Result,
    axes_of,
    by_reference,
    from_numpy,
    ints,
    one,
    optional,
    widened,
)
from qdexport.quant.affine import e4m3_round

__all__ = ["MOVES"]

_FLOATS: Final = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)


def _gather(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, index = one(inputs), one(inputs, 1).to(torch.int64)
    axis = int(attributes.get("axis", 0)) % x.dim()
    size = x.shape[axis]
    flat = index.reshape(-1)
    if bool(((flat < -size) | (flat >= size)).any()):
        raise IndexError(f"an index outside {size} rows")
    flat = torch.where(flat < 0, flat + size, flat)
    picked = x.index_select(axis, flat)
    return picked.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def _slice(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x = one(inputs)
    starts, ends = ints(inputs, 1), ints(inputs, 2)
    axes = ints(inputs, 3) if optional(inputs, 3) is not None else list(range(len(starts)))
    steps = ints(inputs, 4) if optional(inputs, 4) is not None else [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        indices = range(x.shape[axis])[start:end:step]
        x = (
            x.narrow(axis, indices[0], len(indices))
            if step == 1 and len(indices) > 0
            else x.index_select(axis, torch.tensor(list(indices), dtype=torch.int64))
        )
    return x


def _split(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Result:
    x, axis = one(inputs), int(attributes.get("axis", 0))
    if optional(inputs, 1) is not None:
        return torch.split(x, ints(inputs, 1), dim=axis)
    return torch.split(x, math.ceil(x.shape[axis] / len(node.outputs)), dim=axis)


def _concat(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    return torch.cat(widened(*(item for item in inputs if item is not None)), dim=int(attributes["axis"]))


def _reshape(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, shape = one(inputs), ints(inputs, 1)
    if not attributes.get("allowzero", 0):
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return x.reshape(shape)


def _transpose(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x = one(inputs)
    return x.permute(list(attributes.get("perm") or reversed(range(x.dim()))))


def _expand(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, shape = one(inputs), ints(inputs, 1)
    return x.expand(np.broadcast_shapes(x.shape, shape))


def _squeeze(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    axes = axes_of(attributes, inputs)
    return one(inputs).squeeze() if axes is None else one(inputs).squeeze(axes)


def _unsqueeze(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, axes = one(inputs), axes_of(attributes, inputs) or []
    rank = x.dim() + len(axes)
    for axis in sorted(item % rank for item in axes):
        x = x.unsqueeze(axis)
    return x


def _flatten(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, axis = one(inputs), int(attributes.get("axis", 1))
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _shape(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    sizes = list(one(inputs).shape)
    return torch.tensor(sizes[attributes.get("start", 0) : attributes.get("end", len(sizes))], dtype=torch.int64)


def _constant(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    (value,) = attributes.values()
    return from_numpy(value.numpy() if isinstance(value, ir.TensorProtocol) else np.asarray(value))


def _filled(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    value = attributes.get("value")
    fill = torch.zeros(1) if value is None else from_numpy(value.numpy())
    return fill.reshape(-1)[0].expand(ints(inputs, 0)).clone()


def _range(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    start, limit, delta = (one(inputs, index) for index in range(3))
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _pad(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, pads, value = one(inputs), ints(inputs, 1), optional(inputs, 2)
    mode = attributes.get("mode", "constant")
    if mode != "constant":
        return by_reference(node, inputs)[0]
    axes = ints(inputs, 3) if optional(inputs, 3) is not None else list(range(x.dim()))
    widths = [[0, 0] for _ in range(x.dim())]
    for index, axis in enumerate(axes):
        widths[axis] = [pads[index], pads[len(axes) + index]]
    fill = 0.0 if value is None else value.item()
    return F.pad(x, [width for pair in reversed(widths) for width in pair], value=fill)


def _resize(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    """Nearest neighbours, by the rule that the file names; anything else by the reference."""
    x = one(inputs)
    nearest = attributes.get("mode", "nearest") == "nearest" and attributes.get("axes") is None
    where = attributes.get("coordinate_transformation_mode", "half_pixel")
    rule = attributes.get("nearest_mode", "round_prefer_floor")
    if not nearest or where not in {"asymmetric", "half_pixel"} or rule not in {"floor", "round_prefer_floor"}:
        return by_reference(node, inputs)[0]
    scales, sizes = optional(inputs, 2), optional(inputs, 3)
    for axis in range(x.dim()):
        before = x.shape[axis]
        if sizes is not None and sizes.numel():
            after = int(sizes[axis])
            scale = after / before
        else:
            scale = float(one(inputs, 2)[axis]) if scales is not None else 1.0
            after = int(before * scale)
        if after == before and scale == 1.0:
            continue
        position = torch.arange(after, dtype=WIDE)
        position = position / scale if where == "asymmetric" else (position + 0.5) / scale - 0.5
        index = position.floor() if rule == "floor" else (position - 0.5).ceil()
        x = x.index_select(axis, index.to(torch.int64).clamp(0, before - 1))
    return x


def _cast(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, to = one(inputs), ir.DataType(int(attributes["to"]))
    if to in _FLOATS:
        return x if x.is_floating_point() else x.to(torch.float32)
    if to == ir.DataType.BOOL:
        return x != 0
    if to == ir.DataType.FLOAT8E4M3FN:
        return e4m3_round(x).to(x.dtype)
    return x.to(getattr(torch, to.name.lower()))


def _cast_like(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, like = one(inputs), one(inputs, 1)
    if like.is_floating_point():
        return x if x.is_floating_point() else x.to(torch.float32)
    return x.to(like.dtype)


MOVES: Final[dict[str, Callable[[ir.Node, Attributes, Inputs], Result]]] = {
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
