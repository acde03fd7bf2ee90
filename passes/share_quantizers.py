"""Lets layers that read one tensor through equal quantizers read one quantized tensor.

Before: ``x -> FakeQuantize(s) -> to_q``, ``x -> FakeQuantize(s) -> to_k``
After:  ``x -> FakeQuantize(s) -> to_q, to_k``

Identity: equal inputs and parameters give equal outputs. Exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from qdexport.graph.edit import remove_unused, replace_value
from qdexport.graph.query import code_format, const_or_none, input_of, int_attr, is_fake_quantize, module_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["ShareQuantizers"]


class ShareQuantizers:
    """Merges FakeQuantize nodes with the same input, row and parameters."""

    name: ClassVar[str] = "share-quantizers"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ()

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        first: dict[tuple[object, ...], ir.Node] = {}
        for node in model.graph:
            if not is_fake_quantize(node):
                continue
            kept = first.setdefault(_key(node), node)
            if kept is not node:
                replace_value(node.outputs[0], kept.outputs[0])
                report.touched.append(module_of(node))
        if report.touched:
            remove_unused(model)


def _key(node: ir.Node) -> tuple[object, ...]:
    parameters = []
    for index in (1, 2):
        value = input_of(node, index)
        array = const_or_none(value)
        parameters.append(id(value) if array is None else (array.shape, array.tobytes()))
    row = node.inputs[3] if len(node.inputs) > 3 else None
    integers = tuple(int_attr(node, name) for name in ("qmin", "qmax", "axis"))
    return (id(input_of(node, 0)), *parameters, None if row is None else id(row), integers, code_format(node))
