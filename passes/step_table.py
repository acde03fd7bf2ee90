"""Rows of tables, chosen by the step of the running call: one Gather for all columns of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qdexport.graph.edit import NodeWriter
from qdexport.graph.query import input_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["fit_rank", "look_up"]


def look_up(anchor: ir.Node, module: str, row: ir.Value, columns: Sequence[np.ndarray]) -> list[ir.Value]:
    """Writes a table and the lookup of one row in front of a node.

    Args:
        anchor: the first node that reads the row.
        module: names the nodes.
        row: INT64 ``[1]``, or ``[N]`` with a row per sample.
        columns: FP32 ``[R]`` each.

    Returns:
        The row's entry of every column, ``[1, 1]`` or ``[N, 1]``.
    """
    table = np.stack(columns, axis=1).astype(np.float32)
    writer = NodeWriter(anchor, module)
    count = shape_of(row)[0]
    gathered = writer.op(
        "Gather", [writer.constant("rows", table), row], dtype=ir.DataType.FLOAT, shape=[count, table.shape[1]]
    )
    sizes = writer.constant("widths", np.ones(table.shape[1], np.int64))
    return writer.many("Split", [gathered, sizes], {"axis": 1}, [[count, 1]] * table.shape[1])


def fit_rank(node: ir.Node, part: ir.Value, module: str) -> ir.Value:
    """``[1, 1]`` broadcasts as it is; ``[N, 1]``, one row per sample, needs the rank of what ``node`` quantizes."""
    rank = len(shape_of(input_of(node, 0)))
    count = shape_of(part)[0]
    if count == 1 or rank <= 2:
        return part
    writer = NodeWriter(node, module)
    target = writer.constant("per_sample", np.array([-1] + [1] * (rank - 1), np.int64))
    return writer.op("Reshape", [part, target], dtype=part.dtype, shape=[count] + [1] * (rank - 1))
