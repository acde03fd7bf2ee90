"""Puts the biases of an attention's projections into the products, so that attention reads their heads in place.

Before: ``x -> MatMul W -> Add b -> Reshape -> Transpose -> heads``, for each of q, k, v
After:  ``x -> Pad 1 -> MatMul [W; b; 0] -> Reshape -> Transpose -> heads``, one Pad for the three

Identity: ``[x, 1, 1, ...] [[W], [b], [0], ...] = x W + b``. The bias is a product of the same sum, so it is no longer
added to a sum that was rounded before: exact up to roundings that fall away. The width grows by eight, since FP16
products want widths that are multiples of eight.

TensorRT-RTX makes one product of the three either way. With a bias behind it, it then adds and transposes q, k and v in
a kernel each; without one, attention reads all three where the product wrote them, and only the norm in front is split
in two. CLIP ViT-L: 121 kernels become 97.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.query import (
    const_of,
    const_or_none,
    dtype_of,
    input_of,
    ints_attr,
    module_of,
    only_consumer,
    shape_of,
)
from qdexport.graph.runner import WhyNot

if TYPE_CHECKING:
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["BiasInProduct"]

_STEP = 8
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
# heads before length: [N, L, h, D] becomes [N, h, L, D], or its last two axes exchanged
_TO_HEADS = frozenset({(0, 2, 1, 3), (0, 2, 3, 1)})


class BiasInProduct:
    """Rewrites the products with constant weights that share an input and whose biased results become heads."""

    name: ClassVar[str] = "bias-in-product"
    exact: ClassVar[bool] = True
    up_to: ClassVar[str] = "roundings that fall away"
    runs_after: ClassVar[tuple[str, ...]] = ("plain-attention",)

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        if not context.target.merge_projections:
            return
        by_input: dict[ir.Value, list[tuple[ir.Node, ir.Node]]] = {}
        for node in model.graph:
            bias = _bias_of(node)
            if bias is not None:
                by_input.setdefault(input_of(node, 0), []).append((node, bias))
        for x, pairs in by_input.items():
            reason = _why_not(x, len(pairs))
            if reason:
                report.skipped.extend(WhyNot(node.name or "", reason) for node, _ in pairs)
                continue
            _rewrite(x, pairs)
            report.touched.extend(module_of(node) for node, _ in pairs)
        if report.touched:
            remove_unused(model)


def _why_not(x: ir.Value, projections: int) -> str:
    if projections < 3:
        return "fewer than three projections read its input, and the builder joins a bias to a single one"
    if not all(isinstance(dim, int) for dim in shape_of(x)):
        return "its number of rows is known only when it runs, and heads are then reshaped in kernels of their own"
    return ""


def _bias_of(node: ir.Node) -> ir.Node | None:
    """The Add of a constant bias behind a product with a constant weight, in front of a transposition to heads."""
    if node.op_type != "MatMul" or const_or_none(input_of(node, 1)) is None:
        return None
    weight = input_of(node, 1)
    if weight.dtype not in _FLOATS or len(shape_of(weight)) != 2 or node.outputs[0].is_graph_output():
        return None
    add = only_consumer(node.outputs[0])
    if add is None or add.op_type != "Add" or _bias(add) is None:
        return None
    heads = only_consumer(add.outputs[0])
    while heads is not None and heads.op_type in {"Reshape", "Mul"}:
        heads = only_consumer(heads.outputs[0])
    reads = heads is not None and heads.op_type == "Transpose" and ints_attr(heads, "perm") in _TO_HEADS
    return add if reads else None


def _bias(add: ir.Node) -> np.ndarray | None:
    arrays = [array for value in add.inputs if (array := const_or_none(value)) is not None]
    return arrays[0] if arrays and arrays[0].ndim == 1 else None


def _rewrite(x: ir.Value, pairs: list[tuple[ir.Node, ir.Node]]) -> None:
    """Widens the input once, before its first reader, and every weight by the bias and zeros."""
    dims = [int(str(dim)) for dim in shape_of(x)]
    writer = NodeWriter(pairs[0][0])
    pads = writer.constant("pads", np.array([0] * (2 * len(dims) - 1) + [_STEP], np.int64))
    one = writer.constant("one", np.ones((), dtype_of(x).numpy()))
    widened = writer.op("Pad", [x, pads, one], dtype=x.dtype, shape=[*dims[:-1], dims[-1] + _STEP])
    for node, add in pairs:
        weight = const_of(node, 1)
        rows = np.zeros((_STEP, weight.shape[1]), weight.dtype)
        rows[0] = _bias(add)
        node.replace_input_with(0, widened)
        node.replace_input_with(1, NodeWriter(node).constant("weight_and_bias", np.concatenate([weight, rows])))
        replace_value(add.outputs[0], node.outputs[0])
