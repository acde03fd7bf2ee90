"""Turns the constant expression under a weight's quantizer into integer codes.

Before: ``W -> FakeQuantize(s, axis=0) [-> Transpose] -> op``
After:  ``codes -> DequantizeLinear(s, axis) [-> Cast] -> op``

Identity: ``FakeQuantize(W) = codes * s`` with ``codes = clip(rint(W / s), qmin, qmax)`` in FP32. The whole constant
expression counts (a plain weight, a slice of one, an adapter's ``W0 + B A``), so nothing of it stays. Exact up to the
order of sums in an adapter's product: the codes are computed once, with the same FP32 operations as in PyTorch. Codes
are stored as INT8; those of linear layers of up to 4 bits as INT4 where the target computes with it (half the bytes,
the same INT8 product), or where the weight alone is quantized. Scales of blocks are FP16 numbers, and of an FP16 body
stored as such: the builder has a product that reads INT4 in that form alone, and a code times such a scale is exact
before it is rounded once, in either form. Codes of FP8 are E4M3 numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.core.spec import stores_int4
from qdexport.errors import GraphPassError
from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.evaluate import constant_expression, fake_quantize_codes
from qdexport.graph.narrow_floats import e4m3_round
from qdexport.graph.query import (
    code_format,
    const_of,
    dtype_of,
    graph_of,
    input_of,
    int_attr,
    ints_attr,
    is_fake_quantize,
    module_of,
    only_consumer,
)
from qdexport.graph.runner import WhyNot

if TYPE_CHECKING:
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["FoldAdapters"]

_QUANTIZER = ".weight_quantizer"
_BLOCKS_OPSET = 21  # the first whose DequantizeLinear has them
_RANGES = {ir.DataType.INT8: (-128, 127), ir.DataType.INT4: (-8, 7)}


class FoldAdapters:
    """Replaces every FakeQuantize of a constant; refuses codes that their type cannot hold."""

    name: ClassVar[str] = "fold-adapters"
    exact: ClassVar[bool] = True
    up_to: ClassVar[str] = "the order of sums"
    runs_after: ClassVar[tuple[str, ...]] = ("share-quantizers",)

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        for node in list(model.graph):
            if not is_fake_quantize(node) or code_format(node) == "nvfp4":
                continue
            weight = constant_expression(model, input_of(node, 0))
            if weight is not None:
                _fold(node, weight, _storage(node, weight, context, report))
                report.touched.append(module_of(node))
                # the FP weight is released here, so that a large model is never held twice
                remove_unused_inputs(node)
        if report.touched:
            if any("block_size" in node.attributes for node in model.graph if node.op_type == "DequantizeLinear"):
                model.graph.opset_imports[""] = max(model.graph.opset_imports.get("", 0), _BLOCKS_OPSET)
            remove_unused(model)


def remove_unused_inputs(node: ir.Node) -> None:
    """Takes a replaced node out of the graph, and its constant inputs with it when nobody else reads them."""
    graph = node.graph
    inputs = list(node.inputs)
    if not isinstance(graph, ir.Graph):
        return
    graph.remove(node, safe=True)
    for value in inputs:
        if value is not None and value.is_initializer() and not value.uses() and value.name is not None:
            del graph.initializers[value.name]


def _storage(node: ir.Node, weight: np.ndarray, context: PassContext, report: PassReport) -> ir.DataType:
    """FP8 by the quantizer's form, INT4 where the plan says so; of 4-bit codes onnx-tensorrt reads an even number."""
    if code_format(node) == "fp8":
        return ir.DataType.FLOAT8E4M3FN
    plan = context.plan_of(module_of(node).removesuffix(_QUANTIZER))
    if plan is None or not stores_int4(
        plan, int4_linear=context.int4, int4_weight_only=context.int4_weight_only
    ):
        return ir.DataType.INT8
    if weight.size % 2:
        reason = f"{weight.size} weights are an odd number, which cannot be stored as INT4; they stay INT8"
        report.skipped.append(WhyNot(node.name or "", reason))
        return ir.DataType.INT8
    return ir.DataType.INT4


def _fold(node: ir.Node, weight: np.ndarray, storage: ir.DataType) -> None:
    axis = int_attr(node, "axis")
    scale, codes = _codes(node, weight, storage)
    block = codes.shape[axis] // scale.shape[axis] if scale.ndim > 1 else 0
    followers, old = _followers(node)
    if any(item.op_type == "Transpose" for item in followers):
        perm = ints_attr(followers[-1], "perm", tuple(reversed(range(codes.ndim))))
        codes = codes.transpose(perm)
        axis = perm.index(axis) if axis >= 0 else axis
        scale = scale.transpose(perm) if block else scale
    _write_dequantize(node, old, (codes, scale), {"axis": axis, "block_size": block} if block else {"axis": axis})
    for item in reversed(followers):
        graph_of(item).remove(item, safe=True)


def _codes(node: ir.Node, weight: np.ndarray, storage: ir.DataType) -> tuple[np.ndarray, np.ndarray]:
    """The scales, and the codes less their zero points in the type that they are stored in."""
    module = module_of(node)
    axis = int_attr(node, "axis")
    scale, zero_point = const_of(node, 1), const_of(node, 2)
    if scale.shape[0] != 1:
        raise GraphPassError(f"{module}: a weight has one row of scales, not {scale.shape[0]}")
    scale, zero_point = scale[0], zero_point[0]
    if scale.ndim > 1:
        block = weight.shape[axis] // scale.shape[axis]
        wide_scale, wide_zero = (np.repeat(table, block, axis=axis) for table in (scale, zero_point))
    else:
        shape = [1] * weight.ndim
        if axis >= 0:
            shape[axis] = weight.shape[axis]
        wide_scale, wide_zero = scale.reshape(shape), zero_point.reshape(shape)
    if storage == ir.DataType.FLOAT8E4M3FN:
        values = e4m3_round(np.divide(weight, wide_scale, dtype=np.float32))
        return scale, values.astype(storage.numpy())
    qmin, qmax = int_attr(node, "qmin"), int_attr(node, "qmax")
    codes = fake_quantize_codes(weight, wide_scale, wide_zero, qmin, qmax) - wide_zero
    low, high = _RANGES[storage]
    if codes.min() < low or codes.max() > high:
        raise GraphPassError(
            f"{module}: code - zero_point reaches {codes.min():.0f}..{codes.max():.0f}, which {storage} cannot hold; "
            "quantize this weight symmetrically, or with fewer bits"
        )
    return scale, codes.astype(np.int8).astype(storage.numpy())


def _followers(node: ir.Node) -> tuple[list[ir.Node], ir.Value]:
    """The Cast and the Transpose that alone read a quantized weight, and the value behind them."""
    followers: list[ir.Node] = []
    value = node.outputs[0]
    while (reader := only_consumer(value)) is not None and len(followers) < 2:
        if reader.op_type == "Transpose":
            return [*followers, reader], reader.outputs[0]
        if reader.op_type != "Cast":
            break
        followers.append(reader)
        value = reader.outputs[0]
    return [], node.outputs[0]


def _write_dequantize(
    node: ir.Node, old: ir.Value, stored: tuple[np.ndarray, np.ndarray], attributes: dict[str, int]
) -> None:
    writer = NodeWriter(node)
    codes, scale = stored
    body = dtype_of(old)
    kind = body if "block_size" in attributes and body == ir.DataType.FLOAT16 else ir.DataType.FLOAT
    codes_value = writer.constant("codes", codes)
    scale_value = writer.constant("scale", scale.astype(kind.numpy()))
    # the explicit zero point makes ONNX Runtime and every TensorRT parser agree on the type
    zero = writer.constant("zero", np.zeros(scale.shape, codes.dtype))
    inputs = [codes_value, scale_value, zero]
    given = attributes if attributes["axis"] >= 0 else {}
    out = writer.op("DequantizeLinear", inputs, given, dtype=kind, shape=codes.shape)
    replace_value(old, writer.cast(out, body))
