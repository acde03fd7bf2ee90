"""Writes GroupNorm out with FP32 sums where the target then makes one kernel of it.

Before: ``x -> Reshape[N, G, L] -> InstanceNormalization -> Reshape -> y``
After:  ``x -> Reshape[N, G, L] -> Cast -> ReduceMean, Sub, Mul, ReduceMean, Add eps, Sqrt, Div -> Cast -> Reshape
        -> y``

Identity: ``(x - mean) / sqrt(mean((x - mean)^2) + eps)`` over each group, the operator's own definition (its scale is 1
and its bias 0 here; the affine part follows in the graph). Exact up to the order of FP32 sums.

Written out, TensorRT-RTX fuses the convolution's epilogue before, the normalization, SiLU and the quantizer behind it
into one kernel while a group is small; the operator costs two or three. How small is a fact of the target
(``Target.group_norm_elements``), measured by building.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.query import const_or_none, dtype_of, graph_of, input_of, module_of, shape_of
from qdexport.graph.runner import WhyNot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["ExpandGroupNorm"]

_DEFAULT_EPSILON = 1e-5


class ExpandGroupNorm:
    """Replaces InstanceNormalization of small, statically sized groups."""

    name: ClassVar[str] = "expand-group-norm"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ()

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        for node in list(model.graph):
            if node.op_type != "InstanceNormalization":
                continue
            reason = _why_not(node, context.target.group_norm_elements)
            if reason:
                report.skipped.append(WhyNot(node.name or "", reason))
                continue
            _expand(node)
            report.touched.append(module_of(node))
        if report.touched:
            remove_unused(model)


def _why_not(node: ir.Node, most: int) -> str:
    dims = list(shape_of(input_of(node, 0)))
    sizes = [dim for dim in dims[2:] if isinstance(dim, int)]
    scale, bias = const_or_none(input_of(node, 1)), const_or_none(input_of(node, 2))
    if scale is None or bias is None or not (scale == 1).all() or bias.any():
        return "its own scale and bias are not 1 and 0"
    if len(sizes) != len(dims) - 2:
        return "the size of a group is not known before it runs"
    elements = int(np.prod(sizes))
    return f"a group of {elements} elements is above {most}" if elements > most else ""


def _expand(node: ir.Node) -> None:
    x = input_of(node, 0)
    body = dtype_of(x)
    writer = NodeWriter(node)
    epsilon = node.attributes.get("epsilon")
    eps = writer.constant("epsilon", np.float32(_DEFAULT_EPSILON if epsilon is None else epsilon.as_float()))
    axes = writer.constant("axes", np.arange(2, len(shape_of(x)), dtype=np.int64))
    wide = writer.cast(x, ir.DataType.FLOAT)
    means = [*list(shape_of(x))[:2], *(1 for _ in list(shape_of(x))[2:])]
    centred = writer.op("Sub", [wide, _mean(writer, wide, axes, means)], like=wide)
    variance = _mean(writer, writer.op("Mul", [centred, centred], like=wide), axes, means)
    deviation = writer.op("Sqrt", [writer.op("Add", [variance, eps], like=variance)], like=variance)
    y = writer.op("Div", [centred, deviation], like=wide)
    replace_value(node.outputs[0], writer.cast(y, body))
    graph_of(node).remove(node, safe=True)


def _mean(
    writer: NodeWriter, value: ir.Value, axes: ir.Value, shape: Sequence[int | ir.SymbolicDim]
) -> ir.Value:
    return writer.op("ReduceMean", [value, axes], {"keepdims": 1}, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape))
