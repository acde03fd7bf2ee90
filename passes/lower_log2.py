"""Lowers quantizers in front of a floating-point product (attention probabilities) to one pointwise chain.

Before: ``Softmax -> FakeQuantize(s[R], mode[R], row) -> MatMul(P, V)``
After:  ``Softmax -> [Cast] -> chain in FP32 -> [Cast] -> MatMul(P, V)``

Uniform rows: ``y = clip(rint(x / s), 0, qmax) s``, as written. Logarithmic rows, with ``u = x / s`` and ``h`` the FP32
square root of 1/2: ``y = s 2^-q`` where ``h <= u 2^q < 2 h``, by definition of the codes. The power is found in two
steps::

    p = 2^rint(c log2(min(max(u, 2^-Q), 1)))        c a little below 1
    y = p (u < h p ? s / 2 : s),  and 0 where u < h 2^(1-Q),  Q = min(qmax, 126)

ONNX does not say how Log rounds, nor do GPUs agree. With ``c = 1 - 2^-12`` the logarithm, at most 0 here, is drawn
towards 0 by much more than its error, so ``p`` is the power that is wanted or, near the end of its interval, the next
larger one: one exact comparison decides. At 0 itself there is nothing to draw: there ``u`` is near 1, far from the ends
of its interval. Exact: the bounds are powers of two times ``h``, and powers of two and their products with ``s`` are
not rounded (2^-126 is the smallest that FP32 holds as a normal number; codes from 126 on are 0 by definition).

Where rows differ, scales and modes are columns of one table, as in :mod:`qdexport.passes.lower_timestep_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.errors import GraphPassError
from qdexport.graph.dialect import LOG2_ZERO
from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.query import (
    COMPUTE_OPS,
    const_of,
    const_or_none,
    dtype_of,
    graph_of,
    input_of,
    int_attr,
    is_fake_quantize,
    module_of,
    weight_source,
)
from qdexport.passes.step_table import fit_rank, look_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["LowerLog2"]

_MODULE = "softmax_table"
_HALF_ROOT = np.float32(np.sqrt(0.5))
# of log2(u): its error is some 2^-22 of it, and it must not reach the next power but one for 2^-126
_DRAWN_IN = 1 - 2.0**-12
_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """The rows of one quantizer, FP32 ``[R]`` each; one entry where all rows agree."""

    scale: np.ndarray
    mode: np.ndarray
    zero_point: np.ndarray

    def arrays(self) -> list[np.ndarray]:
        """What has to be looked up."""
        return [array for array in (self.scale, self.mode, self.zero_point) if array.size > 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parameters:
    """The row of the running call, as values that broadcast.

    Attributes:
        scale: FP32.
        zero_point: FP32; None where it is 0 in every row.
        logarithmic: BOOL; or the mode of every row.
    """

    scale: ir.Value
    zero_point: ir.Value | None
    logarithmic: ir.Value | bool


class LowerLog2:
    """Rewrites every activation quantizer with a mode, and those that no quantized layer reads."""

    name: ClassVar[str] = "lower-log2"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ("share-quantizers", "fold-adapters")

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        by_row: dict[ir.Value | None, list[ir.Node]] = {}
        for node in model.graph:
            if is_fake_quantize(node) and _is_ours(node):
                by_row.setdefault(node.inputs[3] if len(node.inputs) > 3 else None, []).append(node)
        for row, nodes in by_row.items():
            _lower_all(row, nodes)
            report.touched.extend(module_of(node) for node in nodes)
        if report.touched:
            remove_unused(model)


def _is_ours(node: ir.Node) -> bool:
    if const_or_none(input_of(node, 0)) is not None:
        return False
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        return True
    readers = [use.node for use in node.outputs[0].uses()]
    return (
        const_of(node, 1).ndim == 1
        and bool(readers)
        and not any(item.op_type in COMPUTE_OPS and weight_source(item) is not None for item in readers)
    )


def _columns(node: ir.Node) -> _Columns:
    scale, zero_point = const_of(node, 1), const_of(node, 2)
    mode = const_of(node, 4) if len(node.inputs) > 4 and node.inputs[4] is not None else np.zeros_like(scale)
    if scale.ndim != 1:
        raise GraphPassError(
            f"{module_of(node)}: {scale.shape[1]} scales for the channels of an activation; use one scale per tensor"
        )
    row = len(node.inputs) > 3 and node.inputs[3] is not None
    every = (array.astype(np.float32) if row else array.astype(np.float32)[:1] for array in (scale, mode, zero_point))
    scale, mode, zero_point = (array[:1] if (array == array[0]).all() else array for array in every)
    return _Columns(scale=scale, mode=mode, zero_point=zero_point)


def _lower_all(row: ir.Value | None, nodes: Sequence[ir.Node]) -> None:
    """Quantizers with one row input, or without."""
    columns = [_columns(node) for node in nodes]
    arrays = [array for column in columns for array in column.arrays()]
    parts = iter(look_up(nodes[0], _MODULE, row, arrays) if arrays and row is not None else ())
    for node, column in zip(nodes, columns, strict=True):
        _lower(node, column, [fit_rank(node, next(parts), _MODULE) for _ in column.arrays()])


def _lower(node: ir.Node, columns: _Columns, looked_up: Sequence[ir.Value]) -> None:
    writer = NodeWriter(node)
    parts = iter(looked_up)
    scale = next(parts) if columns.scale.size > 1 else writer.constant("scale", columns.scale)
    logarithmic: ir.Value | bool = bool(columns.mode[0] == 1)
    if columns.mode.size > 1:
        mode = next(parts)
        logarithmic = writer.op("Cast", [mode], {"to": int(ir.DataType.BOOL)}, dtype=ir.DataType.BOOL, shape=mode.shape)
    zero_point = next(parts) if columns.zero_point.size > 1 else None
    if zero_point is None and columns.zero_point.any():
        zero_point = writer.constant("zero_point", columns.zero_point)
    body = dtype_of(node.outputs[0])
    x = writer.cast(input_of(node, 0), _FLOAT)
    u = writer.op("Div", [x, scale], like=x)
    parameters = _Parameters(scale=scale, zero_point=zero_point, logarithmic=logarithmic)
    replace_value(node.outputs[0], writer.cast(_restored(writer, node, u, parameters), body))
    graph_of(node).remove(node, safe=True)


def _restored(writer: NodeWriter, node: ir.Node, u: ir.Value, parameters: _Parameters) -> ir.Value:
    """The quantized and restored tensor, FP32."""
    qmin, qmax = int_attr(node, "qmin"), int_attr(node, "qmax")
    if parameters.logarithmic is True:
        return _power(writer, u, parameters.scale, qmax)
    uniform = _uniform(writer, u, parameters, (qmin, qmax))
    if parameters.logarithmic is False:
        return uniform
    return writer.op("Where", [parameters.logarithmic, _power(writer, u, parameters.scale, qmax), uniform], like=u)


def _uniform(writer: NodeWriter, u: ir.Value, parameters: _Parameters, bounds: tuple[int, int]) -> ir.Value:
    """``(clip(rint(u) + z, qmin, qmax) - z) s``."""
    q = writer.op("Round", [u], like=u)
    if parameters.zero_point is not None:
        q = writer.op("Add", [q, parameters.zero_point], like=u)
    low, high = (writer.constant(label, np.float32(q)) for label, q in zip(("qmin", "qmax"), bounds, strict=True))
    q = writer.op("Clip", [q, low, high], like=u)
    if parameters.zero_point is not None:
        q = writer.op("Sub", [q, parameters.zero_point], like=u)
    return writer.op("Mul", [q, parameters.scale], like=u)


def _power(writer: NodeWriter, u: ir.Value, scale: ir.Value, qmax: int) -> ir.Value:
    """``s 2^-q``, and 0 for the codes that stand for it."""
    last = min(qmax, LOG2_ZERO)
    smallest, one = writer.constant("smallest", np.float32(2.0**-last)), writer.constant("one", np.float32(1))
    logarithm = writer.op("Log", [writer.op("Clip", [u, smallest, one], like=u)], like=u)
    to_base_2 = writer.constant("per_ln2", np.float32(_DRAWN_IN / np.log(2)))
    exponent = writer.op("Round", [writer.op("Mul", [logarithm, to_base_2], like=u)], like=u)
    power = writer.op("Pow", [writer.constant("two", np.float32(2)), exponent], like=u)
    bound = writer.op("Mul", [power, writer.constant("half_root", _HALF_ROOT)], like=u)
    half = const_or_none(scale)
    if half is not None:
        smaller = writer.constant("half_scale", half / np.float32(2))
    else:
        smaller = writer.op("Mul", [scale, writer.constant("half", np.float32(0.5))], like=scale)
    factor = writer.op("Where", [_less(writer, u, bound), smaller, scale], like=u)
    y = writer.op("Mul", [power, factor], like=u)
    vanishing = writer.constant("vanishing", np.float32(_HALF_ROOT * 2.0 ** (1 - last)))
    return writer.op("Where", [_less(writer, u, vanishing), writer.constant("nothing", np.float32(0)), y], like=u)


def _less(writer: NodeWriter, a: ir.Value, b: ir.Value) -> ir.Value:
    return writer.op("Less", [a, b], dtype=ir.DataType.BOOL, shape=a.shape)
