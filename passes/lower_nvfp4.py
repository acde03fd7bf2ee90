"""Lowers NVFP4 quantizers: weights to constants in E2M1 and E4M3, activations to TensorRT's dynamic quantizer.

Before: ``x -> FakeQuantize(nvfp4, g)``
After:  ``x -> TRT_FP4DynamicQuantize(g) -> (q, b)``, ``b -> DequantizeLinear(g) -> s``,
        ``q -> DequantizeLinear(s, blocks of 16) [-> Cast]``
A weight: the same with constants ``q`` and ``b`` and without the dynamic quantizer.

Identity: ``y = q (b g)`` with ``b = e4m3(max |x| / 6 / g)`` for 16 numbers along the last axis and ``q = e2m1(x / (b
g))``. Exact: the constants are made with the FP32 operations of PyTorch. ``b g`` is one FP32 number in either form, and
so is its product with ``q``, which is rounded once to the type of the body. The operator is of onnx-tensorrt (domain
``trt``); ONNX Runtime has none, so that the reference is :mod:`qdexport.graph.nvfp4`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.core.spec import NVFP4_BLOCK
from qdexport.errors import GraphPassError
from qdexport.graph.dialect import LAYER_KEY
from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.evaluate import constant_expression
from qdexport.graph.narrow_floats import nvfp4_codes
from qdexport.graph.nvfp4 import DYNAMIC_QUANTIZE, TRT_DOMAIN, declare_nvfp4
from qdexport.graph.query import (
    code_format,
    const_of,
    dtype_of,
    graph_of,
    input_of,
    is_fake_quantize,
    module_of,
    shape_of,
)

if TYPE_CHECKING:
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["LowerNvfp4"]

_FLOAT, _E2M1, _E4M3 = ir.DataType.FLOAT, ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN


class LowerNvfp4:
    """Replaces every FakeQuantize of the form nvfp4; refuses scales that depend on the step."""

    name: ClassVar[str] = "lower-nvfp4"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ("share-quantizers", "fold-adapters", "fold-reparam")

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        for node in list(model.graph):
            if not is_fake_quantize(node) or code_format(node) != "nvfp4":
                continue
            weight = constant_expression(model, input_of(node, 0))
            writer = NodeWriter(node)
            scale = _scale(node, writer)
            operands = _dynamic(node, writer, scale) if weight is None else _constants(node, writer, weight)
            _dequantize(node, writer, scale, operands)
            report.touched.append(module_of(node))
        if report.touched:
            declare_nvfp4(model)
            remove_unused(model)


def _scale(node: ir.Node, writer: NodeWriter) -> ir.Value:
    scale = const_of(node, 1)
    if scale.size != 1:
        raise GraphPassError(
            f"{module_of(node)}: NVFP4 has one scale per tensor, not {scale.size} (one per step, for instance); set "
            "activation_rows: static"
        )
    return writer.constant("scale", np.float32(scale.reshape(-1)[0]))


def _constants(node: ir.Node, writer: NodeWriter, weight: np.ndarray) -> tuple[ir.Value, ir.Value]:
    codes, narrow = nvfp4_codes(weight, const_of(node, 1))
    return (
        writer.constant("codes", codes.astype(_E2M1.numpy())),
        writer.constant("block_scale", narrow.astype(_E4M3.numpy())),
    )


def _dynamic(node: ir.Node, writer: NodeWriter, scale: ir.Value) -> tuple[ir.Value, ir.Value]:
    x = input_of(node, 0)
    shape = list(shape_of(x))
    if not isinstance(shape[-1], int) or shape[-1] % NVFP4_BLOCK:
        raise GraphPassError(
            f"{module_of(node)}: the last axis, {shape[-1]}, is no multiple of {NVFP4_BLOCK}, the block of NVFP4"
        )
    attributes = {"axis": -1, "block_size": NVFP4_BLOCK, "scale_type": int(_E4M3)}
    name = f"{writer.module}/{DYNAMIC_QUANTIZE}"
    quantize = ir.node(DYNAMIC_QUANTIZE, [x, scale], attributes, domain=TRT_DOMAIN, num_outputs=2, name=name)
    quantize.metadata_props[LAYER_KEY] = writer.module
    graph_of(node).insert_before(node, quantize)
    codes, narrow = quantize.outputs
    for value, kind, last in ((codes, _E2M1, shape[-1]), (narrow, _E4M3, shape[-1] // NVFP4_BLOCK)):
        value.name, value.dtype, value.shape = None, kind, ir.Shape([*shape[:-1], last])
    return codes, narrow


def _dequantize(node: ir.Node, writer: NodeWriter, scale: ir.Value, operands: tuple[ir.Value, ir.Value]) -> None:
    codes, narrow = operands
    old = node.outputs[0]
    wide = writer.op("DequantizeLinear", [narrow, scale], dtype=_FLOAT, shape=narrow.shape)
    blocks = {"axis": -1, "block_size": NVFP4_BLOCK}
    values = writer.op("DequantizeLinear", [codes, wide], blocks, dtype=_FLOAT, shape=codes.shape)
    replace_value(old, writer.cast(values, dtype_of(old)))
    graph_of(node).remove(node, safe=True)
