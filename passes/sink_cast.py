"""Moves the Cast behind a convolution below the Add of a row per channel, so that the sum is rounded once.

Before: ``conv (FP32) -> Mul s -> Add b -> Cast FP16 -> Add row[N, C, 1, 1]``
After:  ``conv (FP32) -> Mul s -> Add b -> Add Cast(row) -> Cast FP16``

Identity: ``y + row`` in FP32 instead of FP16. Exact but for a rounding that falls away: the sum is no longer added to a
number that was rounded before.

The row is that of the time embedding. TensorRT-RTX fuses the sums over a channel that a GroupNorm makes next into the
convolution's epilogue, unless an addition in FP16 stands between an addition in FP32 and them: then it stores the
image in FP32 and makes two kernels more. Per-timestep W8A8 of SD 1.5: 521 kernels become 476.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.query import dtype_of, input_of, module_of, only_consumer, shape_of
from qdexport.graph.runner import WhyNot

if TYPE_CHECKING:
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["SinkCast"]

_FLOAT = ir.DataType.FLOAT
_EPILOGUE = frozenset({"Add", "Mul"})


class SinkCast:
    """Widens the row where an FP32 convolution is narrowed in front of it."""

    name: ClassVar[str] = "sink-cast"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ("lower-zero-point", "lower-timestep-scale")

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        del context  # one rounding is better than two on every target
        for node in list(model.graph):
            if node.op_type != "Cast" or not _narrows_a_convolution(node):
                continue
            add = only_consumer(node.outputs[0])
            if add is None or add.op_type != "Add":
                continue
            row = input_of(add, 1 if input_of(add, 0) is node.outputs[0] else 0)
            if not _is_row(row):
                report.skipped.append(WhyNot(node.name or "", "what is added to it is an image, not a row per channel"))
                continue
            _sink(input_of(node, 0), add, row)
            report.touched.append(module_of(node))
        if report.touched:
            remove_unused(model)


def _narrows_a_convolution(cast: ir.Node) -> bool:
    """Whether a Cast from FP32 to a narrower float stands behind a convolution, its scale and its bias."""
    x = input_of(cast, 0)
    if x.dtype != _FLOAT or dtype_of(cast.outputs[0]) == _FLOAT or not dtype_of(cast.outputs[0]).is_floating_point():
        return False
    producer = x.producer()
    while producer is not None and producer.op_type in _EPILOGUE:
        producer = input_of(producer, 0).producer()
    return producer is not None and producer.op_type == "Conv"


def _is_row(value: ir.Value) -> bool:
    dims = list(shape_of(value))
    return len(dims) > 2 and all(dim == 1 for dim in dims[2:])


def _sink(wide: ir.Value, add: ir.Node, row: ir.Value) -> None:
    narrow = add.outputs[0]
    maker = row.producer()
    widened = NodeWriter(add, None if maker is None else module_of(maker)).cast(row, _FLOAT)  # still of its table
    writer = NodeWriter(add)  # in the block's name: the layer still ends in front of the row
    total = writer.op("Add", [wide, widened], dtype=_FLOAT, shape=list(shape_of(narrow)))
    replace_value(narrow, writer.cast(total, dtype_of(narrow)))
