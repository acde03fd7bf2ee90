"""Writes attention in the form that builders fuse best: one scale on the queries, one transposition of the keys.

Before: ``q -> Mul a``, ``k -> Reshape[B H, L, D] -> Transpose -> Reshape[B, H, D, L] -> Mul b``, then MatMul -> Softmax
After:  ``q -> Mul (a b)``, ``k -> Transpose[B, H, D, L]``, then MatMul -> Softmax

Identity: ``(a q) (b k)^T = (a b q) k^T`` for scalars, and a transposition of the last two axes needs no flattening of
those before. PyTorch's exporter spreads the scale ``1/sqrt(D)`` over both sides as two square roots; TensorRT-RTX then
has a kernel that does nothing but scale the keys. Exact up to roundings that fall away: a product that was rounded on
either side is now rounded on one. This form is the default; a table may keep another for a shape
(:mod:`qdexport.core.forms`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.forms import mark_site
from qdexport.graph.query import const_or_none, dtype_of, input_of, ints_attr, module_of, only_consumer, shape_of
from qdexport.graph.runner import WhyNot

if TYPE_CHECKING:
    from qdexport.core.forms import Signature
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["PlainAttention"]

_MASKING = frozenset({"Add", "Cast"})


class PlainAttention:
    """Rewrites the operands of every product that a Softmax reads."""

    name: ClassVar[str] = "plain-attention"
    exact: ClassVar[bool] = True
    up_to: ClassVar[str] = "roundings that fall away"
    runs_after: ClassVar[tuple[str, ...]] = ()
    operator: ClassVar[str] = "attention"
    forms: ClassVar[tuple[str, ...]] = ("as-exported", "plain")
    default: ClassVar[str] = "plain"

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        for node in list(model.graph):
            if node.op_type != "MatMul" or not _feeds_softmax(node):
                continue
            choice = context.form_of(self.operator, mark_site(node, self.operator, _signature(node)), self.default)
            report.chosen[module_of(node)] = choice.why
            if choice.form != "plain":
                continue
            merged, reason = _merge_scales(node)
            if reason:
                report.skipped.append(WhyNot(node.name or "", reason))
            if _transpose_once(node) or merged:
                report.touched.append(module_of(node))
        if report.touched:
            remove_unused(model)


def _signature(node: ir.Node) -> Signature:
    """Type, and those of queries, keys and depth that are fixed."""
    queries, keys = list(shape_of(input_of(node, 0))), list(shape_of(input_of(node, 1)))
    sizes = {"queries": queries[-2], "keys": keys[-1], "depth": queries[-1]}
    signature: Signature = {"dtype": "fp16" if dtype_of(input_of(node, 0)) == ir.DataType.FLOAT16 else "fp32"}
    return signature | {name: size for name, size in sizes.items() if isinstance(size, int)}


def _feeds_softmax(node: ir.Node) -> bool:
    reader = only_consumer(node.outputs[0])
    while reader is not None and reader.op_type in _MASKING:
        reader = only_consumer(reader.outputs[0])
    return reader is not None and reader.op_type == "Softmax"


def _merge_scales(node: ir.Node) -> tuple[bool, str]:
    """Moves the factor of the second operand to the first; whether that was done, and why not where there is one."""
    left, right = (_scaled(input_of(node, index)) for index in (0, 1))
    if right is None:
        return False, ""
    if left is None:
        return False, "only the second operand is scaled"
    (query, first), (keys, second) = left, right
    dtype = dtype_of(input_of(node, 0))
    # in float64, and rounded once
    factor = np.asarray(first * second, dtype.numpy())
    writer = NodeWriter(node)
    scaled = writer.op("Mul", [query, writer.constant("scale", factor)], like=input_of(node, 0))
    node.replace_input_with(0, scaled)
    node.replace_input_with(1, keys)
    return True, ""


def _scaled(value: ir.Value) -> tuple[ir.Value, float] | None:
    """What is multiplied by a scalar constant, and the constant."""
    node = value.producer()
    if node is None or node.op_type != "Mul":
        return None
    for index in (0, 1):
        constant = const_or_none(input_of(node, index))
        if constant is not None and constant.size == 1:
            return input_of(node, 1 - index), float(constant.reshape(-1)[0])
    return None


def _transpose_once(node: ir.Node) -> bool:
    """Replaces ``[Transpose ->] Reshape -> Transpose -> Reshape`` in front of the keys by one Transpose."""
    keys = input_of(node, 1)
    chain = []
    value = keys
    for kind in ("Reshape", "Transpose", "Reshape"):
        producer = value.producer()
        if producer is None or producer.op_type != kind:
            return False
        chain.append(producer)
        value = input_of(producer, 0)
    if not _swaps_last_two(chain, value, keys):
        return False
    rank = len(shape_of(value))
    perm = [*range(rank - 2), rank - 1, rank - 2]
    inner = value.producer()
    if inner is not None and inner.op_type == "Transpose":
        perm = [ints_attr(inner, "perm")[axis] for axis in perm]
        value = input_of(inner, 0)
    writer = NodeWriter(node)
    once = writer.op("Transpose", [value], {"perm": perm}, dtype=dtype_of(keys), shape=keys.shape)
    replace_value(keys, once)
    return True


def _swaps_last_two(chain: list[ir.Node], source: ir.Value, result: ir.Value) -> bool:
    """Whether the leading axes are flattened, the last two exchanged, and the leading axes restored."""
    restore, transpose, flatten = chain
    before, after = list(shape_of(source)), list(shape_of(result))
    flat, exchanged = list(shape_of(flatten.outputs[0])), list(shape_of(restore.inputs[0] or source))
    if any(isinstance(dim, ir.SymbolicDim) and dim.value is None for dim in (*before, *after)):
        return False  # two unknown sizes need not be equal
    return (
        len(before) == len(after) > len(flat) == 3
        and ints_attr(transpose, "perm") == (0, 2, 1)
        and flat[1:] == before[-2:]
        and exchanged[1:] == after[-2:] == before[:-3:-1]
        and after[:-2] == before[:-2]
    )
