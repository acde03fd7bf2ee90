"""Moves the Cast behind a convolution below an addition, so that the sum is rounded once.

Before: ``conv (FP32) -> Mul s -> Add b -> Cast FP16 -> Add row[N, C, 1, 1]``
After:  ``conv (FP32) -> Mul s -> Add b -> Add Cast(row) -> Cast FP16``
Before: ``Add(Cast FP16(conv_1), Cast FP16(conv_2))``, a block and its convolved shortcut
After:  ``Cast FP16(Add(conv_1, conv_2))``

Identity: the same sum in FP32 instead of FP16. Exact up to roundings that fall away: nothing is added to a number
that was rounded before.

The row is that of the time embedding. TensorRT-RTX fuses the sums over a channel that a GroupNorm makes next into the
convolution's epilogue, unless an addition in FP16 stands between an addition in FP32 and them: then it stores the
image in FP32 and makes two kernels more. Per-timestep W8A8 of SD 1.5: 521 kernels become 477, with rows alone 496.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.query import dtype_of, graph_of, input_of, module_of, only_consumer, shape_of, value_name
from qdexport.graph.runner import WhyNot

if TYPE_CHECKING:
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["SinkCast"]

_FLOAT = ir.DataType.FLOAT
_NARROWER = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_EPILOGUE = frozenset({"Add", "Mul"})


class SinkCast:
    """Adds in FP32 what is added to an FP32 convolution that was narrowed, where it is a row or such a convolution."""

    name: ClassVar[str] = "sink-cast"
    exact: ClassVar[bool] = True
    up_to: ClassVar[str] = "roundings that fall away"
    runs_after: ClassVar[tuple[str, ...]] = ("lower-zero-point", "lower-timestep-scale")

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        del context  # one rounding is better than two on every target
        waiting = [node.outputs[0] for node in model.graph if node.op_type == "Cast"]
        while waiting:
            narrow = waiting.pop(0)
            wide, add = _before_cast(narrow), only_consumer(narrow)
            if wide is None or add is None or add.op_type != "Add":
                continue
            widened = _widened(input_of(add, 1 if input_of(add, 0) is narrow else 0), add)
            if widened is None:
                report.skipped.append(WhyNot(value_name(narrow), "an image that was stored in FP16 is added to it"))
                continue
            report.touched.append(_layer_of(wide))
            waiting.append(_add_wide(wide, widened, add))  # perhaps it sinks below the next addition, too
        if report.touched:
            remove_unused(model)


def _before_cast(value: ir.Value) -> ir.Value | None:
    """The FP32 sum that was narrowed, where it is a convolution's, with scale, bias and what was added before."""
    cast = value.producer()
    if cast is None or cast.op_type != "Cast" or value.dtype not in _NARROWER or input_of(cast, 0).dtype != _FLOAT:
        return None
    producer = input_of(cast, 0).producer()
    while producer is not None and producer.op_type in _EPILOGUE:
        producer = input_of(producer, 0).producer()
    return input_of(cast, 0) if producer is not None and producer.op_type == "Conv" else None


def _layer_of(wide: ir.Value) -> str:
    maker = wide.producer()
    return "" if maker is None else module_of(maker)


def _widened(value: ir.Value, add: ir.Node) -> ir.Value | None:
    """An operand in FP32: a convolution without its Cast, a row per channel by a Cast; None for any other image."""
    wide = _before_cast(value)
    if wide is not None and only_consumer(value) is add:
        return wide
    dims = list(shape_of(value))
    if len(dims) < 3 or any(dim != 1 for dim in dims[2:]):
        return None
    maker = value.producer()
    # in the name of the table that it comes from, which nothing else reads than before
    return NodeWriter(add, None if maker is None else module_of(maker)).cast(value, _FLOAT)


def _add_wide(wide: ir.Value, widened: ir.Value, add: ir.Node) -> ir.Value:
    """Adds in FP32 in place of an Add; returns the narrowed sum."""
    narrow = add.outputs[0]
    writer = NodeWriter(add)  # in the block's name: the layers still end in front of the addition
    total = writer.op("Add", [wide, widened], dtype=_FLOAT, shape=list(shape_of(narrow)))
    result = writer.cast(total, dtype_of(narrow))
    replace_value(narrow, result)
    graph_of(add).remove(add, safe=True)
    return result
