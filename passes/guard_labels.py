"""Makes the class embeddings answer a label outside their tables with NaN instead of another class.

Before: ``label -> Gather(table[N]) -> ...``
After:  ``label -> Max(-1) -> Min(N) -> Gather(table[N + 1]) -> ...``, the last row NaN

Identity: labels from 0 to N - 1 read their own rows. A Gather counts a negative label from the end of its table, and
one behind the end stops one runtime and reads whatever lies there in another; clipped, both read the row of NaN. Since
a quantizer would turn NaN into a code like any other, a column that is 0 in every other row is also added to the
outputs. Exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.graph.edit import NodeWriter
from qdexport.graph.query import const_or_none, dtype_of, module_of, shape_of
from qdexport.passes.guard_outputs import guard_outputs

if TYPE_CHECKING:
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["GuardLabels"]

_MODULE = "label_guard"


class GuardLabels:
    """Puts a row of NaN behind each table of class embeddings, and lets every label without a row read it."""

    name: ClassVar[str] = "guard-labels"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ()

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        spec = context.io.by_role("class_labels")
        labels = next((value for value in model.graph.inputs if spec is not None and value.name == spec.name), None)
        if labels is None or not labels.dtype or not labels.dtype.is_integer():
            return
        by_rows: dict[int, list[tuple[ir.Node, np.ndarray]]] = {}
        for use in labels.uses():
            table = const_or_none(use.node.inputs[0]) if use.node.op_type == "Gather" and use.idx == 1 else None
            if table is not None and table.ndim == 2:
                by_rows.setdefault(len(table), []).append((use.node, table))
        for rows, lookups in by_rows.items():
            _guard(model, labels, rows, lookups)
            report.touched.extend(module_of(node) for node, _ in lookups)


def _guard(model: ir.Model, labels: ir.Value, rows: int, lookups: list[tuple[ir.Node, np.ndarray]]) -> None:
    """Guards all tables of one length."""
    first = lookups[0][0]
    writer = NodeWriter(first, _MODULE)
    inside = writer.op("Max", [labels, writer.constant("first", np.array([-1], np.int64))], like=labels)
    inside = writer.op("Min", [inside, writer.constant("last", np.array([rows], np.int64))], like=labels)
    for node, table in lookups:
        poisoned = np.concatenate([table, np.full((1, table.shape[1]), np.nan, table.dtype)])
        node.replace_input_with(0, NodeWriter(node).constant("rows", poisoned))
        node.replace_input_with(1, inside)
    body = dtype_of(first.outputs[0])
    warning = np.zeros((rows + 1, 1), body.numpy())
    warning[-1] = np.nan
    shape = [*shape_of(labels), 1]
    guard_outputs(
        model, writer.op("Gather", [writer.constant("warning", warning), inside], dtype=body, shape=shape), _MODULE
    )
