"""Lowers activation quantizers whose scale (and zero point) is a row of a table, chosen by the timestep.

Before: ``x -> FakeQuantize(s[R], z[R], row) -> conv``
After:  ``x -> Div s -> Round -> FakeQuantize(1) -> conv -> Mul s -> Add -> Cast``
        with ``s = Split(Gather(table, row))``

Identity: ``conv(W, s q) = s conv(W, q)`` for the scalar ``s`` of a call; zero points as in
:mod:`qdexport.passes.unit_scale`. One Gather serves all quantizers. TensorRT requires constant scales in front of
convolutions (a computed one crashes the RTX builder), hence the constant 1. Exact up to the order of sums: codes come
from the same division and rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from qdexport.core.carrier import carrier_offset
from qdexport.errors import GraphPassError
from qdexport.graph.edit import remove_unused
from qdexport.graph.query import code_format, const_of, input_of, int_attr, is_fake_quantize, module_of
from qdexport.passes.step_table import fit_rank, look_up
from qdexport.passes.unit_scale import UnitScale, rewrite_unit_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["LowerTimestepScale"]

_MODULE = "step_table"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """The rows of one quantizer: FP32 ``[R]`` each."""

    scale: np.ndarray
    zero_point: np.ndarray
    offset: int | None

    def arrays(self) -> list[np.ndarray]:
        """Scale, then zero point when there is one, then the correction when there is one."""
        columns = [self.scale]
        if self.zero_point.any() or self.offset is not None:
            columns.append(self.zero_point)
        if self.offset is not None:
            columns.append(self.offset - self.zero_point)
        return columns


class LowerTimestepScale:
    """Rewrites every FakeQuantize with a row input; all that share one row read one table."""

    name: ClassVar[str] = "lower-timestep-scale"
    exact: ClassVar[bool] = True
    up_to: ClassVar[str] = "the order of sums"
    runs_after: ClassVar[tuple[str, ...]] = (
        "share-quantizers",
        "fold-adapters",
        "fold-reparam",
        "lower-log2",
        "lower-zero-point",
    )

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        by_row: dict[ir.Value, list[ir.Node]] = {}
        for node in model.graph:
            if is_fake_quantize(node) and len(node.inputs) > 3 and node.inputs[3] is not None:
                by_row.setdefault(input_of(node, 3), []).append(node)
        for row, nodes in by_row.items():
            _lower_all(row, nodes)
            report.touched.extend(module_of(node) for node in nodes)
        if report.touched:
            remove_unused(model)


def _lower_all(row: ir.Value, nodes: Sequence[ir.Node]) -> None:
    columns = [_columns(node) for node in nodes]
    arrays = [array for column in columns for array in column.arrays()]
    parts = iter(look_up(nodes[0], _MODULE, row, arrays))
    for node, column in zip(nodes, columns, strict=True):
        values = [fit_rank(node, next(parts), _MODULE) for _ in column.arrays()]
        rewrite_unit_scale(
            node,
            UnitScale(
                scale=values[0],
                zero_point=values[1] if len(values) > 1 else None,
                offset_is_zero_point=column.offset is None,
                offset=column.offset or 0,
                correction=values[2] if len(values) > 2 else None,
            ),
        )


def _columns(node: ir.Node) -> _Columns:
    scale, zero_point = const_of(node, 1).astype(np.float32), const_of(node, 2).astype(np.float32)
    if scale.ndim != 1:
        raise GraphPassError(
            f"{module_of(node)}: {scale.shape[1]} scales for the channels of an activation; use one scale per tensor"
        )
    # codes of FP8 need no carrier
    bounds = int_attr(node, "qmin"), int_attr(node, "qmax")
    offset = carrier_offset(*bounds, zero_point) if code_format(node) == "int" else None
    return _Columns(scale=scale, zero_point=zero_point, offset=offset)
