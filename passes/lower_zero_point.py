"""Removes zero points, which TensorRT does not take, from static activation quantizers.

Fits INT8 (``qmin - z >= -128`` and ``qmax - z <= 127``; every width up to 7): only the bounds move::

    clip(rint(x / s) + z, qmin, qmax) - z  =  clip(rint(x / s), qmin - z, qmax - z)

Does not fit (unsigned 8-bit): the unit-scale form with offset 128, explicit padding with the real 0, and the
correction in an FP32 bias (:mod:`qdexport.passes.unit_scale`). Both are exact up to the order of sums: codes cannot
differ, not even at ties, since the rounding comes before the shift.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.core.carrier import carrier_offset
from qdexport.errors import GraphPassError
from qdexport.graph.edit import NodeWriter, remove_unused
from qdexport.graph.query import code_format, const_of, int_attr, is_fake_quantize, module_of
from qdexport.passes.unit_scale import UnitScale, rewrite_unit_scale

if TYPE_CHECKING:
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["LowerZeroPoint"]


class LowerZeroPoint:
    """Rewrites static quantizers whose zero point is not 0, or whose codes exceed INT8."""

    name: ClassVar[str] = "lower-zero-point"
    exact: ClassVar[bool] = True
    up_to: ClassVar[str] = "the order of sums"
    runs_after: ClassVar[tuple[str, ...]] = ("share-quantizers", "fold-adapters", "fold-reparam", "lower-log2")

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        for node in list(model.graph):
            if is_fake_quantize(node) and const_of(node, 1).shape[0] == 1 and _needs_lowering(node):
                _lower(node)
                report.touched.append(module_of(node))
        if report.touched:
            remove_unused(model)


def _needs_lowering(node: ir.Node) -> bool:
    if code_format(node) != "int":  # FP8 and NVFP4 have no zero point, and do not travel in INT8
        return False
    bounds = int_attr(node, "qmin"), int_attr(node, "qmax")
    return bool(const_of(node, 2).any()) or bounds[0] < -128 or bounds[1] > 127


def _lower(node: ir.Node) -> None:
    qmin, qmax = int_attr(node, "qmin"), int_attr(node, "qmax")
    zero_point = const_of(node, 2).astype(np.float32)
    if zero_point.size != 1:
        raise GraphPassError(
            f"{module_of(node)}: {zero_point.size} zero points for the channels of an activation; "
            "use one scale per tensor"
        )
    offset = carrier_offset(qmin, qmax, zero_point)
    writer = NodeWriter(node)
    if offset is None:
        shift = int(zero_point.reshape(-1)[0])
        node.attributes["qmin"] = ir.AttrInt64("qmin", qmin - shift)
        node.attributes["qmax"] = ir.AttrInt64("qmax", qmax - shift)
        node.replace_input_with(2, writer.constant("zero_point", np.zeros_like(zero_point)))
        return
    rewrite_unit_scale(
        node,
        UnitScale(
            scale=writer.constant("scale", const_of(node, 1).astype(np.float32)),
            zero_point=writer.constant("zero_point", zero_point),
            offset_is_zero_point=False,
            offset=offset,
            correction=writer.constant("correction", offset - zero_point),
        ),
    )
