"""ONNX operators on tensors in float64.

Types of floating point have no roundings here: a Cast between them does nothing, and what meets a float64 tensor
becomes float64 itself. Tensors made from constants and whole numbers alone stay in FP32, as PyTorch computes them
(sines of a timestep, for instance): there FP32 is part of what the network means. Integer codes are float64 numbers.

An operator that is not in the table is executed by onnx's reference implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from qdexport.errors import ParityError
from qdexport.graph.nvfp4 import DYNAMIC_QUANTIZE
from qdexport.quant.affine import block_scales, e4m3_round, nvfp4_codes

__all__ = ["UnsupportedError", "execute", "from_numpy", "widened"]

Inputs = Sequence[Tensor | None]
Attributes = Mapping[str, Any]
Result = Tensor | tuple[Tensor, ...]

_WIDE: Final = torch.float64
_NARROW: Final = (torch.float16, torch.bfloat16, torch.float32)
_FLOATS: Final = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)
_BOUNDS: Final = {
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
}


class UnsupportedError(ParityError):
    """An operator that neither this module nor onnx's reference can execute."""


def execute(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """The outputs of one node.

    Raises:
        UnsupportedError: nothing here can execute such an operator; the node is named.
        ParityError: it does not take these inputs.
    """
    attributes = {
        name: item.value for name, item in node.attributes.items() if isinstance(item, ir.Attr)
    }
    function = _OPERATORS.get(node.op_type)
    try:
        if function is not None:
            result = function(node, attributes, inputs)
            return result if isinstance(result, tuple) else (result,)
        return _by_reference(node, inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        missing = function is None or isinstance(error, NotImplementedError)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        text = f"{node.name} ({node.op_type}) cannot be executed in float64: {reason}"
        raise (UnsupportedError if missing else ParityError)(text) from error


def from_numpy(array: np.ndarray) -> Tensor:
    """A constant: FP16 and narrower numbers as FP32, 4-bit integers as INT8."""
    kind = array.dtype
    if kind in (np.float32, np.float64, np.bool_) or kind.kind in "iu":
        if kind.kind == "u" and kind.itemsize > 1:
            array = array.astype(np.int64)
        return torch.from_numpy(np.array(array, copy=True))
    name = kind.name
    return torch.from_numpy(array.astype(np.int8 if "int" in name else np.float32))


def widened(*tensors: Tensor) -> list[Tensor]:
    """In float64, if one of them is."""
    if not any(item.dtype == _WIDE for item in tensors):
        return list(tensors)
    return [item.to(_WIDE) if item.dtype in _NARROW else item for item in tensors]


def _by_reference(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    names = [f"input_{index}" if item is not None else "" for index, item in enumerate(inputs)]
    outputs = [f"output_{index}" for index in range(len(node.outputs))]
    proto = ir.to_proto(node)
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.extend(outputs)
    any_type = onnx.TypeProto()
    graph = onnx.helper.make_graph(
        [proto],
        "one",
        [onnx.helper.make_value_info(name, any_type) for name in names if name],
        [onnx.helper.make_value_info(name, any_type) for name in outputs],
    )
    version = node.graph.opset_imports.get(node.domain, 20) if isinstance(node.graph, ir.Graph) else 20
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(node.domain, version)])
    feeds = {name: item.numpy() for name, item in zip(names, inputs, strict=True) if item is not None}
    results: list[Any] = ReferenceEvaluator(model).run(None, feeds)  # type: ignore[assignment]  # onnx has it wider
    return tuple(from_numpy(np.asarray(item)) for item in results)


def _one(inputs: Inputs, index: int = 0) -> Tensor:
    item = inputs[index] if index < len(inputs) else None
    if item is None:
        raise ValueError(f"input {index} is missing")
    return item


def _optional(inputs: Inputs, index: int) -> Tensor | None:
    return inputs[index] if index < len(inputs) else None


def _ints(inputs: Inputs, index: int) -> list[int]:
    return [int(value) for value in _one(inputs, index).reshape(-1).tolist()]


def _axes(attributes: Attributes, inputs: Inputs, index: int = 1) -> list[int] | None:
    if _optional(inputs, index) is not None:
        return _ints(inputs, index)
    axes = attributes.get("axes")
    return None if axes is None else list(axes)


def _plain(function: Callable[[Tensor], Tensor]) -> Callable[..., Result]:
    return lambda node, attributes, inputs: function(_one(inputs))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Result]:
    return lambda node, attributes, inputs: function(*widened(_one(inputs), _one(inputs, 1)))


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Result]:
    def apply(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
        first, *rest = widened(*(item for item in inputs if item is not None))
        for item in rest:
            first = function(first, item)
        return first

    return apply


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _power(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b.to(a.dtype)) if a.is_floating_point() else torch.pow(a, b)


def _modulo(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    a, b = widened(_one(inputs), _one(inputs, 1))
    return torch.fmod(a, b) if attributes.get("fmod", 0) else torch.remainder(a, b)


def _cast(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, to = _one(inputs), ir.DataType(int(attributes["to"]))
    if to in _FLOATS:
        return x if x.is_floating_point() else x.to(torch.float32)
    if to == ir.DataType.BOOL:
        return x != 0
    if to == ir.DataType.FLOAT8E4M3FN:
        return e4m3_round(x).to(x.dtype)
    return x.to(getattr(torch, to.name.lower()))


def _cast_like(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, like = _one(inputs), _one(inputs, 1)
    if like.is_floating_point():
        return x if x.is_floating_point() else x.to(torch.float32)
    return x.to(like.dtype)


def _along(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Scales or zero points in a shape that broadcasts against ``x``."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    if block:
        return parameter.repeat_interleave(block, dim=axis)
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def _quantize(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, scale = _one(inputs).to(_WIDE), _one(inputs, 1).to(_WIDE)
    axis, block = int(attributes.get("axis", 1)), int(attributes.get("block_size", 0))
    ratio = x / _along(scale, x, axis, block)
    kind = node.outputs[0].dtype
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        kind = node.inputs[2].dtype
    if kind == ir.DataType.FLOAT8E4M3FN:
        return e4m3_round(ratio).to(_WIDE)
    if kind not in _BOUNDS:
        raise NotImplementedError(f"codes of type {kind}")
    codes = ratio.round_()
    zero = _optional(inputs, 2)
    if zero is not None:
        codes = codes + _along(zero.to(_WIDE), x, axis, block)
    return codes.clamp_(*_BOUNDS[kind])


def _dequantize(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    codes, scale, zero = _one(inputs).to(_WIDE), _one(inputs, 1).to(_WIDE), _optional(inputs, 2)
    axis, block = int(attributes.get("axis", 1)), int(attributes.get("block_size", 0))
    if zero is not None and bool((zero != 0).any()):
        codes = codes - _along(zero.to(_WIDE), codes, axis, block)
    return codes * _along(scale, codes, axis, block)


def _dynamic_quantize(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Result:
    x, scale = _one(inputs).to(torch.float32), _one(inputs, 1).to(torch.float32)
    return nvfp4_codes(x, scale).to(_WIDE), block_scales(x, scale)[..., 0].to(_WIDE)


def _matmul(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    return torch.matmul(*widened(_one(inputs), _one(inputs, 1)))


def _gemm(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    a, b = widened(_one(inputs), _one(inputs, 1))
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    y = float(attributes.get("alpha", 1.0)) * (a @ b)
    c = _optional(inputs, 2)
    return y if c is None else y + float(attributes.get("beta", 1.0)) * c


def _conv(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    if attributes.get("auto_pad", "NOTSET") != "NOTSET":
        raise NotImplementedError("auto_pad")
    operands = widened(*(item for item in inputs if item is not None))
    x, weight = operands[:2]
    bias = operands[2] if len(operands) > 2 else None
    rank = weight.dim() - 2
    pads = list(attributes.get("pads") or [0] * 2 * rank)
    begins, ends = pads[:rank], pads[rank:]
    if begins != ends:
        x = F.pad(x, [width for pair in reversed(list(zip(begins, ends, strict=True))) for width in pair])
        begins = [0] * rank
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    y: Tensor = function(
        x,
        weight,
        bias,
        stride=list(attributes.get("strides") or [1] * rank),
        padding=begins,
        dilation=list(attributes.get("dilations") or [1] * rank),
        groups=int(attributes.get("group", 1)),
    )
    return y


def _layer_norm(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    operands = widened(*(item for item in inputs if item is not None))
    x = operands[0]
    axis = int(attributes.get("axis", -1)) % x.dim()
    weight = operands[1] if len(operands) > 1 else None
    bias = operands[2] if len(operands) > 2 else None
    # weights may have leading dimensions of size 1
    y = F.layer_norm(x, x.shape[axis:], eps=_epsilon(attributes))
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, weight = widened(_one(inputs), _one(inputs, 1))
    axis = int(attributes.get("axis", -1)) % x.dim()
    squares = (x * x).mean(dim=list(range(axis, x.dim())), keepdim=True)
    return x / (squares + _epsilon(attributes)).sqrt() * weight


def _instance_norm(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, weight, bias = widened(_one(inputs), _one(inputs, 1), _one(inputs, 2))
    return F.instance_norm(x, weight=weight, bias=bias, eps=_epsilon(attributes))


def _group_norm(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, weight, bias = widened(_one(inputs), _one(inputs, 1), _one(inputs, 2))
    return F.group_norm(x, int(attributes["num_groups"]), weight, bias, _epsilon(attributes))


def _epsilon(attributes: Attributes) -> float:
    # stored in FP32, which PyTorch's own number is not
    return float(np.float32(attributes.get("epsilon", 1e-5)))


def _gelu(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    approximate = attributes.get("approximate", "none")
    return F.gelu(_one(inputs), approximate=approximate)


def _clip(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, low, high = _one(inputs), _optional(inputs, 1), _optional(inputs, 2)
    x = x if low is None else torch.maximum(*widened(x, low))
    return x if high is None else torch.minimum(*widened(x, high))


def _where(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    a, b = widened(_one(inputs, 1), _one(inputs, 2))
    return torch.where(_one(inputs), a, b)


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Result]:
    def apply(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
        x, axes = _one(inputs), _axes(attributes, inputs)
        if axes is None:
            if attributes.get("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.dim()))
        return function(x, dim=axes, keepdim=bool(attributes.get("keepdims", 1)))

    return apply


def _product(x: Tensor, dim: list[int], *, keepdim: bool) -> Tensor:
    for axis in sorted((item % x.dim() for item in dim), reverse=True):
        x = x.prod(dim=axis, keepdim=keepdim)
    return x


def _best_index(function: Callable[..., Tensor]) -> Callable[..., Result]:
    def apply(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
        if attributes.get("select_last_index", 0):
            raise NotImplementedError("select_last_index")
        return function(_one(inputs), dim=int(attributes.get("axis", 0)), keepdim=bool(attributes.get("keepdims", 1)))

    return apply


def _softmax(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    return _one(inputs).softmax(dim=int(attributes.get("axis", -1)))


def _gather(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, index = _one(inputs), _one(inputs, 1).to(torch.int64)
    axis = int(attributes.get("axis", 0)) % x.dim()
    size = x.shape[axis]
    flat = index.reshape(-1)
    if bool(((flat < -size) | (flat >= size)).any()):
        raise IndexError(f"an index outside {size} rows")
    flat = torch.where(flat < 0, flat + size, flat)
    picked = x.index_select(axis, flat)
    return picked.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def _slice(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x = _one(inputs)
    starts, ends = _ints(inputs, 1), _ints(inputs, 2)
    axes = _ints(inputs, 3) if _optional(inputs, 3) is not None else list(range(len(starts)))
    steps = _ints(inputs, 4) if _optional(inputs, 4) is not None else [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        indices = range(x.shape[axis])[start:end:step]
        x = (
            x.narrow(axis, indices[0], len(indices))
            if step == 1 and len(indices) > 0
            else x.index_select(axis, torch.tensor(list(indices), dtype=torch.int64))
        )
    return x


def _split(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Result:
    x, axis = _one(inputs), int(attributes.get("axis", 0))
    if _optional(inputs, 1) is not None:
        return torch.split(x, _ints(inputs, 1), dim=axis)
    return torch.split(x, math.ceil(x.shape[axis] / len(node.outputs)), dim=axis)


def _concat(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    return torch.cat(widened(*(item for item in inputs if item is not None)), dim=int(attributes["axis"]))


def _reshape(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, shape = _one(inputs), _ints(inputs, 1)
    if not attributes.get("allowzero", 0):
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return x.reshape(shape)


def _transpose(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x = _one(inputs)
    return x.permute(list(attributes.get("perm") or reversed(range(x.dim()))))


def _expand(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, shape = _one(inputs), _ints(inputs, 1)
    return x.expand(np.broadcast_shapes(x.shape, shape))


def _squeeze(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    axes = _axes(attributes, inputs)
    return _one(inputs).squeeze() if axes is None else _one(inputs).squeeze(axes)


def _unsqueeze(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, axes = _one(inputs), _axes(attributes, inputs) or []
    rank = x.dim() + len(axes)
    for axis in sorted(item % rank for item in axes):
        x = x.unsqueeze(axis)
    return x


def _flatten(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, axis = _one(inputs), int(attributes.get("axis", 1))
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _shape(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    sizes = list(_one(inputs).shape)
    return torch.tensor(sizes[attributes.get("start", 0) : attributes.get("end", len(sizes))], dtype=torch.int64)


def _constant(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    (value,) = attributes.values()
    return from_numpy(value.numpy() if isinstance(value, ir.TensorProtocol) else np.asarray(value))


def _filled(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    value = attributes.get("value")
    fill = torch.zeros(1) if value is None else from_numpy(value.numpy())
    return fill.reshape(-1)[0].expand(_ints(inputs, 0)).clone()


def _range(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    start, limit, delta = (_one(inputs, index) for index in range(3))
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _pad(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, pads, value = _one(inputs), _ints(inputs, 1), _optional(inputs, 2)
    mode = attributes.get("mode", "constant")
    if mode != "constant":
        return _by_reference(node, inputs)[0]
    axes = _ints(inputs, 3) if _optional(inputs, 3) is not None else list(range(x.dim()))
    widths = [[0, 0] for _ in range(x.dim())]
    for index, axis in enumerate(axes):
        widths[axis] = [pads[index], pads[len(axes) + index]]
    fill = 0.0 if value is None else value.item()
    return F.pad(x, [width for pair in reversed(widths) for width in pair], value=fill)


def _resize(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    """Nearest neighbours, by the rule that the file names; anything else by the reference."""
    x = _one(inputs)
    nearest = attributes.get("mode", "nearest") == "nearest" and attributes.get("axes") is None
    where = attributes.get("coordinate_transformation_mode", "half_pixel")
    rule = attributes.get("nearest_mode", "round_prefer_floor")
    if not nearest or where not in {"asymmetric", "half_pixel"} or rule not in {"floor", "round_prefer_floor"}:
        return _by_reference(node, inputs)[0]
    scales, sizes = _optional(inputs, 2), _optional(inputs, 3)
    for axis in range(x.dim()):
        before = x.shape[axis]
        if sizes is not None and sizes.numel():
            after = int(sizes[axis])
            scale = after / before
        else:
            scale = float(_one(inputs, 2)[axis]) if scales is not None else 1.0
            after = int(before * scale)
        if after == before and scale == 1.0:
            continue
        position = torch.arange(after, dtype=_WIDE)
        position = position / scale if where == "asymmetric" else (position + 0.5) / scale - 0.5
        index = position.floor() if rule == "floor" else (position - 0.5).ceil()
        x = x.index_select(axis, index.to(torch.int64).clamp(0, before - 1))
    return x


def _average_pool(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, kernel = _one(inputs), list(attributes["kernel_shape"])
    if len(kernel) != 2 or any(attributes.get("pads") or []) or attributes.get("ceil_mode", 0):
        return _by_reference(node, inputs)[0]
    return F.avg_pool2d(x, kernel, stride=list(attributes.get("strides") or kernel))


def _cumulative(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    if attributes.get("exclusive", 0) or attributes.get("reverse", 0):
        return _by_reference(node, inputs)[0]
    return _one(inputs).cumsum(dim=int(_one(inputs, 1)))


_OPERATORS: Final[dict[str, Callable[[ir.Node, Attributes, Inputs], Result]]] = {
    "Abs": _plain(torch.abs),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "ArgMax": _best_index(torch.argmax),
    "ArgMin": _best_index(torch.argmin),
    "AveragePool": _average_pool,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _plain(torch.ceil),
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Conv": _conv,
    "Cos": _plain(torch.cos),
    "CumSum": _cumulative,
    "DequantizeLinear": _dequantize,
    "Div": _binary(_divide),
    "Equal": _binary(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _plain(torch.floor),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "GroupNormalization": _group_norm,
    "Identity": _plain(lambda x: x),
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _plain(torch.log),
    "MatMul": _matmul,
    "Max": _variadic(torch.maximum),
    "Min": _variadic(torch.minimum),
    "Mod": _modulo,
    "Mul": _binary(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "Pad": _pad,
    "Pow": _binary(_power),
    "QuantizeLinear": _quantize,
    "RMSNormalization": _rms_norm,
    "Range": _range,
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMin": _reduced(torch.amin),
    "ReduceProd": _reduced(_product),
    "ReduceSum": _reduced(torch.sum),
    "Relu": _plain(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": _plain(torch.round),
    "Shape": _shape,
    "Sigmoid": _plain(torch.sigmoid),
    "Sin": _plain(torch.sin),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(torch.sub),
    "Sum": _variadic(torch.add),
    "Tanh": _plain(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
    DYNAMIC_QUANTIZE: _dynamic_quantize,
}
