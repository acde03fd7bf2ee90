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

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.graph.dimension import size_of
from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.query import const_or_none, dtype_of, graph_of, input_of, module_of, shape_of
from qdexport.graph.runner import WhyNot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["ExpandGroupNorm"]

_DEFAULT_EPSILON = 1e-5


class ExpandGroupNorm:
    """Replaces InstanceNormalization of groups that are small at every size that the network may have."""

    name: ClassVar[str] = "expand-group-norm"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ()

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        largest = {dim.name: dim.high for dim in context.io.dynamic_dims}
        for node in list(model.graph):
            if node.op_type != "InstanceNormalization":
                continue
            reason = _why_not(node, context.target.group_norm_elements, largest)
            if reason:
                report.skipped.append(WhyNot(node.name or "", reason))
                continue
            _expand(node)
            report.touched.append(module_of(node))
        if report.touched:
            remove_unused(model)


def _why_not(node: ir.Node, most: int, largest: Mapping[str, int]) -> str:
    scale, bias = const_or_none(input_of(node, 1)), const_or_none(input_of(node, 2))
    if scale is None or bias is None or not (scale == 1).all() or bias.any():
        return "its own scale and bias are not 1 and 0"
    elements = _elements(input_of(node, 0), largest)
    if elements is None:
        return "the size of a group is not known before it runs"
    return f"a group of {elements} elements is above {most}" if elements > most else ""


def _elements(x: ir.Value, largest: Mapping[str, int]) -> int | None:
    """How many elements a group has, at the largest sizes; a size that is left over by a Reshape is what it reads."""
    dims = list(shape_of(x))
    sizes = [size_of(dim, largest) for dim in dims[2:]]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        return math.prod(known)
    producer = x.producer()
    if producer is None or producer.op_type != "Reshape" or not isinstance(dims[1], int):
        return None
    source = [size_of(dim, largest) for dim in list(shape_of(input_of(producer, 0)))[1:]]
    known = [size for size in source if size is not None]
    return math.prod(known) // dims[1] if len(known) == len(source) else None


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
