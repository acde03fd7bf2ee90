"""ONNX operators on tensors in float64.

Types of floating point have no roundings here: a Cast between them does nothing, and what meets a float64 tensor
becomes float64 itself. Tensors made from constants and whole numbers alone stay in FP32, as PyTorch computes them
(sines of a timestep, for instance): there FP32 is part of what the network means. Integer codes are float64 numbers.

An operator that is not in the table is executed by onnx's reference implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from qdexport.check.float64.moves import MOVES
from qdexport.check.float64.operands import (
    WIDE,
    Attributes,
    Inputs,
    Result,
    axes_of,
    by_reference,
    one,
    optional,
    widened,
)
from qdexport.errors import ParityError
from qdexport.graph.nvfp4 import DYNAMIC_QUANTIZE
from qdexport.quant.affine import block_scales, e4m3_round, nvfp4_codes

__all__ = ["UnsupportedError", "execute"]

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
        return by_reference(node, inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        missing = function is None or isinstance(error, NotImplementedError)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        text = f"{node.name} ({node.op_type}) cannot be executed in float64: {reason}"
        raise (UnsupportedError if missing else ParityError)(text) from error


def _plain(function: Callable[[Tensor], Tensor]) -> Callable[..., Result]:
    return lambda node, attributes, inputs: function(one(inputs))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Result]:
    return lambda node, attributes, inputs: function(*widened(one(inputs), one(inputs, 1)))


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
    a, b = widened(one(inputs), one(inputs, 1))
    return torch.fmod(a, b) if attributes.get("fmod", 0) else torch.remainder(a, b)


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
    x, scale = one(inputs).to(WIDE), one(inputs, 1).to(WIDE)
    axis, block = int(attributes.get("axis", 1)), int(attributes.get("block_size", 0))
    ratio = x / _along(scale, x, axis, block)
    kind = node.outputs[0].dtype
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        kind = node.inputs[2].dtype
    if kind == ir.DataType.FLOAT8E4M3FN:
        return e4m3_round(ratio).to(WIDE)
    if kind not in _BOUNDS:
        raise NotImplementedError(f"codes of type {kind}")
    codes = ratio.round_()
    zero = optional(inputs, 2)
    if zero is not None:
        codes = codes + _along(zero.to(WIDE), x, axis, block)
    return codes.clamp_(*_BOUNDS[kind])


def _dequantize(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    codes, scale, zero = one(inputs).to(WIDE), one(inputs, 1).to(WIDE), optional(inputs, 2)
    axis, block = int(attributes.get("axis", 1)), int(attributes.get("block_size", 0))
    if zero is not None and bool((zero != 0).any()):
        codes = codes - _along(zero.to(WIDE), codes, axis, block)
    return codes * _along(scale, codes, axis, block)


def _dynamic_quantize(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Result:
    x, scale = one(inputs).to(torch.float32), one(inputs, 1).to(torch.float32)
    return nvfp4_codes(x, scale).to(WIDE), block_scales(x, scale)[..., 0].to(WIDE)


def _matmul(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    return torch.matmul(*widened(one(inputs), one(inputs, 1)))


def _gemm(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    a, b = widened(one(inputs), one(inputs, 1))
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    y = float(attributes.get("alpha", 1.0)) * (a @ b)
    c = optional(inputs, 2)
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
    x, weight = widened(one(inputs), one(inputs, 1))
    axis = int(attributes.get("axis", -1)) % x.dim()
    squares = (x * x).mean(dim=list(range(axis, x.dim())), keepdim=True)
    return x / (squares + _epsilon(attributes)).sqrt() * weight


def _instance_norm(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, weight, bias = widened(one(inputs), one(inputs, 1), one(inputs, 2))
    return F.instance_norm(x, weight=weight, bias=bias, eps=_epsilon(attributes))


def _group_norm(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, weight, bias = widened(one(inputs), one(inputs, 1), one(inputs, 2))
    return F.group_norm(x, int(attributes["num_groups"]), weight, bias, _epsilon(attributes))


def _epsilon(attributes: Attributes) -> float:
    # stored in FP32, which PyTorch's own number is not
    return float(np.float32(attributes.get("epsilon", 1e-5)))


def _gelu(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    approximate = attributes.get("approximate", "none")
    return F.gelu(one(inputs), approximate=approximate)


def _clip(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, low, high = one(inputs), optional(inputs, 1), optional(inputs, 2)
    x = x if low is None else torch.maximum(*widened(x, low))
    return x if high is None else torch.minimum(*widened(x, high))


def _where(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    a, b = widened(one(inputs, 1), one(inputs, 2))
    return torch.where(one(inputs), a, b)


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Result]:
    def apply(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
        x, axes = one(inputs), axes_of(attributes, inputs)
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
        return function(one(inputs), dim=int(attributes.get("axis", 0)), keepdim=bool(attributes.get("keepdims", 1)))

    return apply


def _softmax(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    return one(inputs).softmax(dim=int(attributes.get("axis", -1)))


def _average_pool(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    x, kernel = one(inputs), list(attributes["kernel_shape"])
    if len(kernel) != 2 or any(attributes.get("pads") or []) or attributes.get("ceil_mode", 0):
        return by_reference(node, inputs)[0]
    return F.avg_pool2d(x, kernel, stride=list(attributes.get("strides") or kernel))


def _cumulative(node: ir.Node, attributes: Attributes, inputs: Inputs) -> Tensor:
    if attributes.get("exclusive", 0) or attributes.get("reverse", 0):
        return by_reference(node, inputs)[0]
    return one(inputs).cumsum(dim=int(one(inputs, 1)))


_OPERATORS: Final[dict[str, Callable[[ir.Node, Attributes, Inputs], Result]]] = {
    "Abs": _plain(torch.abs),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "ArgMax": _best_index(torch.argmax),
    "ArgMin": _best_index(torch.argmin),
    "AveragePool": _average_pool,
    "Ceil": _plain(torch.ceil),
    "Clip": _clip,
    "Conv": _conv,
    "Cos": _plain(torch.cos),
    "CumSum": _cumulative,
    "DequantizeLinear": _dequantize,
    "Div": _binary(_divide),
    "Equal": _binary(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Floor": _plain(torch.floor),
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
    "Pow": _binary(_power),
    "QuantizeLinear": _quantize,
    "RMSNormalization": _rms_norm,
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMin": _reduced(torch.amin),
    "ReduceProd": _reduced(_product),
    "ReduceSum": _reduced(torch.sum),
    "Relu": _plain(torch.relu),
    "Round": _plain(torch.round),
    "Sigmoid": _plain(torch.sigmoid),
    "Sin": _plain(torch.sin),
    "Softmax": _softmax,
    "Sqrt": _plain(torch.sqrt),
    "Sub": _binary(torch.sub),
    "Sum": _variadic(torch.add),
    "Tanh": _plain(torch.tanh),
    "Where": _where,
    **MOVES,
    DYNAMIC_QUANTIZE: _dynamic_quantize,
}
