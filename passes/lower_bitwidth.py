"""Lowers static symmetric activation quantizers to a QuantizeLinear/DequantizeLinear pair, in INT8 or FP8.

Before: ``x -> FakeQuantize(s, z=0, qmin, qmax)``
After:  ``x [-> Cast] [-> Clip(qmin s, qmax s)] -> QuantizeLinear(s) -> DequantizeLinear(s) [-> Cast]``

Identity: INT8 saturates at -128 and 127, so a narrower range needs a Clip only; ``rint(clip(x, a s, b s) / s) =
clip(rint(x / s), a, b)`` for integers a, b, since ``fl(fl(a s) / s)`` rounds to ``a``. Exact up to the order of sums of
merged products, below. This is the portable typed form: FP32 scales between casts, which TensorRT 10.0 to 11.4,
TensorRT-RTX and ONNX Runtime all compute alike. Layers with INT4 weights, and merged ones (pass merge-projections),
read the FP32 value directly and cast their product instead (:mod:`qdexport.passes.float32_product`); the scales of
merged ones stand behind the product. FP8 saturates at 448 by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.errors import GraphPassError
from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.query import (
    code_format,
    compute_consumers,
    const_of,
    dtype_of,
    graph_of,
    input_of,
    int_attr,
    is_fake_quantize,
    is_merged,
    module_of,
)
from qdexport.passes.float32_product import (
    dequantized_weight,
    multiply_codes,
    multiply_in_float32,
    stores_int4_codes,
)

if TYPE_CHECKING:
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["LowerBitwidth"]

_INT8_MIN, _INT8_MAX = -128, 127


class LowerBitwidth:
    """Replaces every FakeQuantize that is left; refuses what earlier passes should have rewritten."""

    name: ClassVar[str] = "lower-bitwidth"
    exact: ClassVar[bool] = True
    up_to: ClassVar[str] = "the order of sums"
    runs_after: ClassVar[tuple[str, ...]] = (
        "share-quantizers",
        "fold-adapters",
        "lower-log2",
        "lower-nvfp4",
        "lower-zero-point",
        "lower-timestep-scale",
    )

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        for node in list(model.graph):
            if is_fake_quantize(node):
                _lower(node)
                report.touched.append(module_of(node))
        if report.touched:
            remove_unused(model)


def _lower(node: ir.Node) -> None:
    scale, zero_point = const_of(node, 1), const_of(node, 2)
    qmin, qmax = int_attr(node, "qmin"), int_attr(node, "qmax")
    fp8 = code_format(node) == "fp8"
    if fp8:
        qmin, qmax = _INT8_MIN, _INT8_MAX  # nothing to clip
    if scale.size != 1 or zero_point.any() or qmin < _INT8_MIN or qmax > _INT8_MAX:
        raise GraphPassError(
            f"{module_of(node)}: a quantizer with {scale.size} scales and codes {qmin}..{qmax} is not symmetric INT8 "
            "or FP8; run lower-zero-point and lower-timestep-scale first"
        )
    step = np.float32(scale.reshape(-1)[0])
    writer = NodeWriter(node)
    body = dtype_of(node.outputs[0])
    x = writer.cast(input_of(node, 0), ir.DataType.FLOAT)
    if qmin > _INT8_MIN or qmax < _INT8_MAX:
        bounds = [
            None if at_end else writer.constant(label, np.float32(code) * step)
            for label, code, at_end in (("low", qmin, qmin == _INT8_MIN), ("high", qmax, qmax == _INT8_MAX))
        ]
        x = writer.op("Clip", [x, *bounds], like=x)
    scale_value = writer.constant("scale", np.float32(step))
    kind = ir.DataType.FLOAT8E4M3FN if fp8 else ir.DataType.INT8
    zero = writer.constant("zero", np.zeros((), kind.numpy()))
    codes = writer.op("QuantizeLinear", [x, scale_value, zero], dtype=kind, shape=x.shape)
    restored = writer.op("DequantizeLinear", [codes, scale_value, zero], dtype=ir.DataType.FLOAT, shape=x.shape)
    for item in list(compute_consumers(node.outputs[0])):
        if is_merged(item) and const_of(dequantized_weight(item), 1).size > 1:
            multiply_codes(item, restored)
        elif stores_int4_codes(item):
            multiply_in_float32(item, restored)
    if node.outputs[0].uses() or node.outputs[0].is_graph_output():
        replace_value(node.outputs[0], writer.cast(restored, body))
    graph_of(node).remove(node, safe=True)
