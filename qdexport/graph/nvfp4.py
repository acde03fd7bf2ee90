"""NVFP4 without a GPU: TensorRT's dynamic quantizer in numpy, and written out in operators that ONNX Runtime has.

``TRT_FP4DynamicQuantize(x, g)`` of onnx-tensorrt gives codes ``q`` in E2M1 and scales ``b`` in E4M3 of blocks of 16
along the last axis::

    b = e4m3(max |x| / 6 / g)        q = e2m1(x / (b g)), 0 where b is 0

Its arithmetic is NVIDIA's; no machine without a GPU of compute capability 10.0 or 12.0 can run it. These two forms
say what qdexport takes it to be, and are compared with each other and with PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qdexport.core.spec import NVFP4_BLOCK
from qdexport.graph.edit import NodeWriter, name_everything, replace_value
from qdexport.graph.query import const_or_none, input_of

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["DYNAMIC_QUANTIZE", "NVFP4_OPSET", "TRT_DOMAIN", "declare_nvfp4", "executable", "has_nvfp4"]

TRT_DOMAIN = "trt"
DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"
_E2M1_MAX = 6.0
NVFP4_OPSET, _IR_VERSION = 23, 11
_FLOAT, _E2M1, _E4M3 = ir.DataType.FLOAT, ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN
_BOUNDS = ((2.0, 0.5), (4.0, 1.0))  # below the first number the distance of neighbours is the second; else 2


def has_nvfp4(model: ir.Model) -> bool:
    """Whether a graph has tensors in E2M1."""
    return any(value.dtype == _E2M1 for value in _values(model))


def declare_nvfp4(model: ir.Model) -> None:
    """Raises the versions of a model to the first that have E2M1, and declares the domain of the quantizer."""
    model.graph.opset_imports[""] = max(model.graph.opset_imports.get("", 0), NVFP4_OPSET)
    model.graph.opset_imports[TRT_DOMAIN] = 1
    model.ir_version = max(model.ir_version or 0, _IR_VERSION)


def executable(model: ir.Model) -> None:
    """Writes NVFP4 out in FP32 operators, in place: the numbers are those of the operators that it replaces.

    Codes and block scales that are outputs of the graph become FP32.
    """
    for node in list(model.graph):
        if node.op_type == DYNAMIC_QUANTIZE:
            _write_out(node)
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and input_of(node, 0).dtype in {_E2M1, _FLOAT}:
            _multiply(node)
    model.graph.opset_imports.pop(TRT_DOMAIN, None)
    common_passes.RemoveUnusedNodesPass()(model)
    name_everything(model)


def _values(model: ir.Model) -> Iterable[ir.Value]:
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _write_out(node: ir.Node) -> None:
    """``(q, b)`` of one dynamic quantizer, in FP32."""
    writer = NodeWriter(node)
    codes, narrow = node.outputs
    scale = input_of(node, 1)
    blocks, shape = _in_blocks(writer, writer.cast(input_of(node, 0), _FLOAT))
    axis = writer.constant("last_axis", np.array([-1], np.int64))
    largest = writer.op("ReduceMax", [writer.op("Abs", [blocks], like=blocks), axis], {"keepdims": 1}, dtype=_FLOAT)
    b = _e4m3(writer, _divided(writer, _divided(writer, largest, _number(writer, _E2M1_MAX)), scale))
    wide = writer.op("Mul", [b, scale], dtype=_FLOAT)
    some = writer.op("Greater", [wide, _number(writer, 0.0)], dtype=ir.DataType.BOOL)
    rounded = _e2m1(writer, _divided(writer, blocks, wide))
    q = writer.op("Where", [some, rounded, _number(writer, 0.0)], dtype=_FLOAT, shape=blocks.shape)
    replace_value(codes, _flat(writer, q, shape))
    replace_value(narrow, writer.op("Squeeze", [b, axis], dtype=_FLOAT, shape=narrow.shape))


def _multiply(node: ir.Node) -> None:
    """A DequantizeLinear whose codes are FP32 numbers by now, or constants in E2M1."""
    writer = NodeWriter(node)
    codes, scale = input_of(node, 0), input_of(node, 1)
    constant = const_or_none(codes)
    if codes.dtype == _E2M1 and constant is not None:
        codes = writer.constant("codes", constant.astype(np.float32))
    if "block_size" in node.attributes:
        blocks, shape = _in_blocks(writer, codes)
        wide = writer.op("Unsqueeze", [scale, writer.constant("last_axis", np.array([-1], np.int64))], dtype=_FLOAT)
        product = _flat(writer, writer.op("Mul", [blocks, wide], like=blocks), shape)
    else:
        product = writer.op("Mul", [codes, scale], like=codes)
    replace_value(node.outputs[0], product)


def _in_blocks(writer: NodeWriter, x: ir.Value) -> tuple[ir.Value, list[int | ir.SymbolicDim]]:
    """``[..., K]`` as ``[..., K / 16, 16]``, and the former shape."""
    shape = list(x.shape or ())
    leading = len(shape) - 1
    last = shape[-1]
    count = last // NVFP4_BLOCK if isinstance(last, int) else -1
    target = writer.constant("blocks", np.array([*[0] * leading, count, NVFP4_BLOCK], np.int64))
    return writer.op("Reshape", [x, target], dtype=_FLOAT, shape=[*shape[:-1], count, NVFP4_BLOCK]), shape


def _flat(writer: NodeWriter, x: ir.Value, shape: list[int | ir.SymbolicDim]) -> ir.Value:
    target = writer.constant("shape", np.array([*[0] * (len(shape) - 1), -1], np.int64))
    return writer.op("Reshape", [x, target], dtype=_FLOAT, shape=shape)


def _e4m3(writer: NodeWriter, x: ir.Value) -> ir.Value:
    """To E4M3 and back; QuantizeLinear saturates at 448, and rounds half to even."""
    one = _number(writer, 1.0)
    zero = writer.constant("zero", np.zeros((), ml_dtypes.float8_e4m3fn))
    codes = writer.op("QuantizeLinear", [x, one, zero], dtype=_E4M3, shape=x.shape)
    return writer.op("DequantizeLinear", [codes, one, zero], dtype=_FLOAT, shape=x.shape)


def _e2m1(writer: NodeWriter, x: ir.Value) -> ir.Value:
    """To the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, half to even: multiples of their steps."""
    clipped = writer.op("Clip", [x, _number(writer, -_E2M1_MAX), _number(writer, _E2M1_MAX)], like=x)
    size = writer.op("Abs", [clipped], like=x)
    step = _number(writer, 2.0)
    for bound, distance in reversed(_BOUNDS):
        below = writer.op("Less", [size, _number(writer, bound)], dtype=ir.DataType.BOOL, shape=x.shape)
        step = writer.op("Where", [below, _number(writer, distance), step], like=x)
    whole = writer.op("Round", [_divided(writer, clipped, step)], like=x)
    return writer.op("Mul", [whole, step], like=x)


def _divided(writer: NodeWriter, x: ir.Value, by: ir.Value) -> ir.Value:
    return writer.op("Div", [x, by], like=x)


def _number(writer: NodeWriter, value: float) -> ir.Value:
    return writer.constant("number", np.float32(value))
