"""Reads an ONNX file back: with which type does each layer compute?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from qdexport.core.layer_names import node_names
from qdexport.core.precision import ONNX
from qdexport.emit.inspect import load_onnx
from qdexport.graph.query import COMPUTE_OPS, const_or_none

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from qdexport.core.spec import LayerPlan

__all__ = ["onnx_coverage", "onnx_weight_types"]

# what may stand between a DequantizeLinear and the layer, or between a constant and its DequantizeLinear
_PASSIVE = frozenset({"Cast", "Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten"})
_NAMES = {
    ir.DataType.INT8: "int8",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT4E2M1: "nvfp4",
}
_FLOATS = {ir.DataType[onnx]: name for name, onnx in ONNX.items()}


def onnx_coverage(path: Path, layers: Iterable[LayerPlan]) -> dict[str, str]:
    """The compute type of every layer, from the file alone.

    Args:
        path: an emitted ONNX file; weights are not read.
        layers: whose parts to look for, by the node names ``layer/Conv``, ``layer/MatMul`` and ``layer/Gemm``.

    Returns:
        ``int8`` (or another narrow type) where both operands are quantized, the operand's float type otherwise,
        ``folded`` where a folded layer has no node, ``missing`` where any other layer has none. INT4 weights behind a
        Cast are no ``int4``: a builder then multiplies in the type of the Cast.
    """
    model = load_onnx(path)
    nodes = {name: node for node in model.graph if node.op_type in COMPUTE_OPS for name in node_names(node.name or "")}
    coverage = {}
    for layer in layers:
        for part in layer.parts:
            node = next((nodes[name] for op in COMPUTE_OPS if (name := f"{part}/{op}") in nodes), None)
            if node is None:
                coverage[part] = "folded" if layer.folded else "missing"
            else:
                coverage[part] = _compute_type(node)
    return coverage


def onnx_weight_types(path: Path, names: Iterable[str]) -> dict[str, str]:
    """The type that the weight of each named layer is stored in, from the file alone; ``missing`` without the layer's
    node, ``float`` where the weight is no constant behind a DequantizeLinear.
    """
    model = load_onnx(path)
    nodes = {name: node for node in model.graph if node.op_type in COMPUTE_OPS for name in node_names(node.name or "")}
    found = {}
    for name in names:
        node = next((nodes[key] for op in COMPUTE_OPS if (key := f"{name}/{op}") in nodes), None)
        found[name] = "missing" if node is None else _narrow_type(node.inputs[1]) or "float"
    return found


def _compute_type(node: ir.Node) -> str:
    weight, activation = _narrow_type(node.inputs[1]), _narrow_type(node.inputs[0])
    if weight is not None and activation is not None and not (weight == "int4" and _is_cast(node)):
        return weight
    value = node.outputs[0] if node.outputs[0].dtype is not None else node.inputs[0]
    known = _FLOATS.get(value.dtype) if value is not None and value.dtype is not None else None
    return known or "unknown"


def _is_cast(node: ir.Node) -> bool:
    """Whether a Cast stands between a layer and the DequantizeLinear of either operand."""
    for value in node.inputs[:2]:
        producer = None if value is None else value.producer()
        while producer is not None and producer.op_type in _PASSIVE:
            if producer.op_type == "Cast":
                return True
            source = producer.inputs[0]
            producer = None if source is None else source.producer()
    return False


def _narrow_type(value: ir.Value | None) -> str | None:
    """The stored type behind a DequantizeLinear; None when the value does not come from one."""
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in _PASSIVE:
        source = producer.inputs[0]
        producer = None if source is None else source.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    stored = producer.inputs[0]
    while stored is not None and const_or_none(stored) is None:
        maker = stored.producer()
        if maker is None or maker.op_type not in _PASSIVE:
            break
        stored = maker.inputs[0]
    if stored is None:
        return None
    maker = stored.producer()
    if maker is not None and maker.op_type == "QuantizeLinear":
        zero = maker.inputs[2] if len(maker.inputs) > 2 else None
        return None if zero is None or zero.dtype is None else _NAMES.get(zero.dtype)
    return None if stored.dtype is None else _NAMES.get(stored.dtype)
