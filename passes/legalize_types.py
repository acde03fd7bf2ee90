"""Makes every edge typed and every cast necessary.

Before: ``x(fp16) -> Cast(fp32) -> Cast(fp16) -> y``, ``x(fp32) -> Cast(fp32) -> y``
After:  ``x -> y``

Identity: a cast to the own type, and a widening cast followed by its inverse, change nothing. Exact. What reads two
floating types without a cast is refused by name, since a strongly typed parser would refuse it without one; but Concat
joins them as PyTorch does, and a layer with FP16 weights reads its input in FP16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from qdexport.errors import GraphPassError
from qdexport.graph.dialect import DOMAIN
from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.nvfp4 import DYNAMIC_QUANTIZE
from qdexport.graph.query import COMPUTE_OPS, dtype_of, input_of, module_of, value_name

if TYPE_CHECKING:
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["LegalizeTypes"]

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_WIDER = {(ir.DataType.FLOAT16, ir.DataType.FLOAT), (ir.DataType.BFLOAT16, ir.DataType.FLOAT)}
_MIXED_BY_DEFINITION = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "Cast", "CastLike", "Resize", DYNAMIC_QUANTIZE}
)


class LegalizeTypes:
    """Removes needless casts, and checks that operands of one node have one floating type."""

    name: ClassVar[str] = "legalize-types"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = (
        "fold-time-embedding",
        "fold-adapters",
        "lower-zero-point",
        "lower-timestep-scale",
        "lower-bitwidth",
    )

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        for node in list(model.graph):
            if node.op_type == "Cast" and _drop_cast(node):
                report.touched.append(module_of(node))
        if report.touched:
            remove_unused(model)
        for node in list(model.graph):
            if (node.op_type == "Concat" and _promote(node)) or (node.op_type in COMPUTE_OPS and _narrow(node)):
                report.touched.append(module_of(node))
        for node in model.graph:
            _check(node)


def _drop_cast(node: ir.Node) -> bool:
    source = input_of(node, 0)
    to = ir.DataType(node.attributes["to"].as_int())
    if dtype_of(source) == to:
        replace_value(node.outputs[0], source)
        return True
    inner = source.producer()
    if inner is None or inner.op_type != "Cast":
        return False
    origin = input_of(inner, 0)
    if dtype_of(origin) == to and (to, dtype_of(source)) in _WIDER:
        replace_value(node.outputs[0], origin)
        return True
    return False


def _promote(node: ir.Node) -> bool:
    """PyTorch concatenates FP16 and FP32 to FP32 (SDXL: text beside time ids); ONNX wants that said."""
    types = [value.dtype for value in node.inputs if value is not None]
    if set(types) != {ir.DataType.FLOAT16, ir.DataType.FLOAT}:
        return False
    writer = NodeWriter(node)
    for index, value in enumerate(node.inputs):
        if value is not None:
            node.replace_input_with(index, writer.cast(value, ir.DataType.FLOAT))
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return True


def _narrow(node: ir.Node) -> bool:
    """A layer with FP16 weights that reads FP32 reads FP16: diffusers does not cast the sines of class labels."""
    x, *operands = [value for value in node.inputs if value is not None]
    if x.dtype != ir.DataType.FLOAT or {value.dtype for value in operands} != {ir.DataType.FLOAT16}:
        return False
    node.replace_input_with(0, NodeWriter(node).cast(x, ir.DataType.FLOAT16))
    y = node.outputs[0]
    if y.dtype != ir.DataType.FLOAT16:
        y.type = ir.TensorType(ir.DataType.FLOAT16)
        widened = NodeWriter(node, after=True).cast(y, ir.DataType.FLOAT)
        replace_value(y, widened, keep=[maker for maker in (widened.producer(),) if maker is not None])
    return True


def _check(node: ir.Node) -> None:
    if node.domain == DOMAIN:
        raise GraphPassError(f"{module_of(node)}: {node.op_type} was not lowered")
    if node.op_type in _MIXED_BY_DEFINITION:
        return
    types = {value.dtype for value in node.inputs if value is not None and value.dtype in _FLOATS}
    if len(types) > 1:
        pairs = ", ".join(f"{value_name(v)} {v.dtype}" for v in node.inputs if v is not None and v.dtype in _FLOATS)
        raise GraphPassError(f"{node.name} ({node.op_type}) reads several floating types: {pairs}")
