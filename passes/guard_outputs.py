"""Carries a warning to the outputs of the network, past every quantizer.

INT8 has no NaN: behind a quantizer, a NaN is a code like any other. What a table cannot answer is therefore also added
to the outputs, as a column that is 0 in every valid row and NaN in the others.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdexport.graph.edit import NodeWriter, replace_value
from qdexport.graph.query import dtype_of, shape_of

__all__ = ["guard_outputs"]

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def guard_outputs(model: ir.Model, guard: ir.Value, module: str) -> None:
    """Adds a column of 0 or NaN to every floating-point output.

    Args:
        model: its outputs keep their names and types.
        guard: ``[1, 1]``, or ``[N, 1]`` for outputs with N rows.
        module: whom the added nodes belong to.
    """
    for output in list(model.graph.outputs):
        node = output.producer()
        if node is None or output.dtype not in _FLOATS:
            continue
        writer = NodeWriter(node, module, after=True)
        rank, count = len(shape_of(output)), shape_of(guard)[0]
        column = guard
        if rank != 2:
            target = writer.constant("guard_shape", np.array([-1] + [1] * (rank - 1), np.int64))
            column = writer.op("Reshape", [guard, target], dtype=guard.dtype, shape=[count] + [1] * (rank - 1))
        total = writer.op("Add", [output, writer.cast(column, dtype_of(output))], like=output)
        adding = total.producer()
        replace_value(output, total, keep=[] if adding is None else [adding])
