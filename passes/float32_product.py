"""Layers whose operands reach the product in FP32, whatever the type of the body."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdexport.errors import GraphPassError
from qdexport.graph.edit import NodeWriter, replace_value
from qdexport.graph.query import const_of, dtype_of, input_of, module_of, weight_source

__all__ = ["dequantized_weight", "multiply_in_float32", "stores_int4_codes"]

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
