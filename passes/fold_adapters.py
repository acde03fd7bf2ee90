"""Turns the constant expression under a weight's quantizer into integer codes.

Before: ``W -> FakeQuantize(s, axis=0) [-> Transpose] -> op``
After:  ``codes(INT8) -> DequantizeLinear(s, axis) [-> Cast] -> op``

Identity: ``FakeQuantize(W) = codes * s`` with ``codes = clip(rint(W / s), qmin, qmax)`` in FP32. The whole constant
expression counts (a plain weight, a slice of one, an adapter's ``W0 + B A``), so nothing of it stays. Exact: the codes
are computed once, with the same FP32 operations as in PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.errors import GraphPassError
from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.evaluate import constant_expression, fake_quantize_codes
from qdexport.graph.query import (
    const_of,
    dtype_of,
    input_of,
    int_attr,
    ints_attr,
    is_fake_quantize,
    module_of,
    only_consumer,
)

if TYPE_CHECKING:
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["FoldAdapters"]


class FoldAdapters:
    """Replaces every FakeQuantize of a constant; refuses codes that INT8 cannot hold."""

    name: ClassVar[str] = "fold-adapters"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ("share-quantizers",)

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        for node in list(model.graph):
            if not is_fake_quantize(node):
                continue
            weight = constant_expression(model, input_of(node, 0))
            if weight is not None:
                _fold(node, weight)
                report.touched.append(module_of(node))
                # the FP weight is released here, so that a large model is never held twice
                remove_unused_inputs(node)
        if report.touched:
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


def _fold(node: ir.Node, weight: np.ndarray) -> None:
    module = module_of(node)
    axis = int_attr(node, "axis")
    scale, zero_point = const_of(node, 1), const_of(node, 2)
    if scale.shape[0] != 1:
        raise GraphPassError(f"{module}: a weight has one row of scales, not {scale.shape[0]}")
    scale, zero_point = scale[0], zero_point[0]
    shape = [1] * weight.ndim
    if axis >= 0:
        shape[axis] = weight.shape[axis]
    wide_scale, wide_zero = scale.reshape(shape), zero_point.reshape(shape)
    qmin, qmax = int_attr(node, "qmin"), int_attr(node, "qmax")
    codes = fake_quantize_codes(weight, wide_scale, wide_zero, qmin, qmax) - wide_zero
    if codes.min() < -128 or codes.max() > 127:
        raise GraphPassError(
            f"{module}: code - zero_point reaches {codes.min():.0f}..{codes.max():.0f}, which INT8 cannot hold; "
            "quantize this weight symmetrically, or with at most 7 bits"
        )
    codes = codes.astype(np.int8)
    transpose = only_consumer(node.outputs[0])
    if transpose is not None and transpose.op_type == "Transpose":
        perm = ints_attr(transpose, "perm", tuple(reversed(range(codes.ndim))))
        codes = codes.transpose(perm)
        axis = perm.index(axis) if axis >= 0 else axis
        old = transpose.outputs[0]
    else:
        transpose, old = None, node.outputs[0]
    _write_dequantize(node, old, codes, scale, axis)
    if transpose is not None:
        graph = transpose.graph
        if isinstance(graph, ir.Graph):
            graph.remove(transpose, safe=True)


def _write_dequantize(node: ir.Node, old: ir.Value, codes: np.ndarray, scale: np.ndarray, axis: int) -> None:
    writer = NodeWriter(node)
    stored = writer.constant("codes", codes)
    scale_value = writer.constant("scale", scale.astype(np.float32))
    # the explicit INT8 zero point makes ONNX Runtime and every TensorRT parser agree on the type
    zero = writer.constant("zero", np.zeros(scale.shape, np.int8))
    attributes = {"axis": axis} if axis >= 0 else {}
    body = dtype_of(old)
    out = writer.op(
        "DequantizeLinear", [stored, scale_value, zero], attributes, dtype=ir.DataType.FLOAT, shape=codes.shape
    )
    replace_value(old, writer.cast(out, body))
