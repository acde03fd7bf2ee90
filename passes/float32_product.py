"""Layers whose operands reach the product in FP32, whatever the type of the body."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdexport.errors import GraphPassError
from qdexport.graph.edit import NodeWriter, replace_value
from qdexport.graph.query import const_of, dtype_of, input_of, int_attr, module_of, weight_source

__all__ = ["codes_alone", "dequantized_weight", "multiply_codes", "multiply_in_float32", "stores_int4_codes"]

_FLOAT = ir.DataType.FLOAT


def dequantized_weight(node: ir.Node) -> ir.Node:
    """The DequantizeLinear that feeds a layer; nothing but a Cast may stand between, since it is passed over.

    Raises:
        GraphPassError: the weight is not quantized, or something else stands between.
    """
    weight = weight_source(node)
    if weight is None or weight.op_type != "DequantizeLinear":
        raise GraphPassError(f"{module_of(node)}: the weight is not quantized although the input is")
    between = input_of(node, 1).producer()
    while between is not None and between is not weight:
        if between.op_type != "Cast":
            raise GraphPassError(
                f"{module_of(node)}: a {between.op_type} stands between the quantized weight and the layer; "
                "run fold-adapters first, and let no two layers share one weight"
            )
        between = input_of(between, 0).producer()
    return weight


def stores_int4_codes(node: ir.Node) -> bool:
    """Whether the weight of a layer is a DequantizeLinear of INT4 codes."""
    weight = weight_source(node)
    return weight is not None and weight.op_type == "DequantizeLinear" and input_of(weight, 0).dtype == ir.DataType.INT4


def multiply_in_float32(node: ir.Node, activation: ir.Value) -> None:
    """Lets a linear layer multiply FP32 operands, with one Cast to its former type behind the product.

    Exact operands, one rounding: with a narrower type each operand would be rounded first. TensorRT-RTX computes
    INT8 x INT4 with integers in this form only; a Cast in front of the product makes it a floating-point one.

    Args:
        node: a MatMul or Gemm behind a DequantizeLinear; a Gemm's bias is widened.
        activation: FP32, takes the place of the first operand.

    Raises:
        GraphPassError: the weight has another form.
    """
    body = dtype_of(node.outputs[0])
    node.replace_input_with(0, activation)
    node.replace_input_with(1, dequantized_weight(node).outputs[0])
    if body == _FLOAT:
        return
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        node.replace_input_with(2, NodeWriter(node).constant("bias", const_of(node, 2).astype(np.float32)))
    product = node.outputs[0]
    product.type = ir.TensorType(_FLOAT)
    narrow = NodeWriter(node, after=True).cast(product, body)
    cast = narrow.producer()
    replace_value(product, narrow, keep=[] if cast is None else [cast])


def multiply_codes(node: ir.Node, activation: ir.Value) -> None:
    """Lets a product multiply bare weight codes in FP32, with their scales per output feature in a Mul behind it.

    ``x (k w) = (x k) w`` for weight codes ``k`` and a scale ``w`` per column. One Cast to its former type follows.

    Args:
        node: a MatMul behind a DequantizeLinear.
        activation: FP32, takes the place of the first operand.
    """
    body = dtype_of(node.outputs[0])
    scale, _ = codes_alone(node)
    node.replace_input_with(0, activation)
    product = node.outputs[0]
    product.type = ir.TensorType(_FLOAT)
    writer = NodeWriter(node, after=True)
    scaled = writer.op("Mul", [product, writer.constant("weight_scale", scale.astype(np.float32))], like=product)
    keep = [maker for maker in (scaled.producer(),) if maker is not None]
    replace_value(product, writer.cast(scaled, body), keep=keep)


def codes_alone(node: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """Lets the layer multiply bare weight codes; returns what that took away, both float64 per output channel.

    Returns:
        The weight scales (one, or one per channel), and the sums of the codes.
    """
    weight = dequantized_weight(node)
    codes, scale = const_of(weight, 0), const_of(weight, 1).astype(np.float64).reshape(-1)
    writer = NodeWriter(node, module_of(weight))
    transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not int_attr(node, "transB", 0))
    axis = 1 if transposed else 0
    # one scale is enough for INT8; the RTX builder takes INT4 codes with a scale per channel only
    per_channel = input_of(weight, 0).dtype == ir.DataType.INT4
    units, attributes = ((codes.shape[axis],), {"axis": axis}) if per_channel else ((), {})
    unit, zero = (
        writer.constant("unit", np.ones(units, np.float32)),
        writer.constant("zero", np.zeros(units, codes.dtype)),
    )
    operands = [input_of(weight, 0), unit, zero]
    node.replace_input_with(1, writer.op("DequantizeLinear", operands, attributes, dtype=_FLOAT, shape=codes.shape))
    sums = codes.sum(axis=tuple(i for i in range(codes.ndim) if i != axis), dtype=np.int64)  # no copy of the codes
    return np.broadcast_to(scale, sums.shape), sums.astype(np.float64)
