"""Refuses by name what the target's opset cannot express, or its parser does not take, before a file is written.

onnx's own checker says that a file is illegal, the builder says so after minutes or, on a Jetson, on another machine.
Here the layer is still known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from qdexport.errors import EmitError
from qdexport.graph.query import const_or_none, value_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qdexport.core.parsers import OnnxParser
    from qdexport.core.target import Target

__all__ = ["check_legal", "illegal_nodes"]

_SHOWN = 3
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MOVES_CODES = frozenset({"Concat", "Identity", "Reshape", "Shape", "Squeeze", "Transpose", "Unsqueeze"})
_IO_ONLY = frozenset({"UINT8"})
_STRINGS = {name: f"tensor({name.lower()})" for name in ir.DataType.__members__}


def check_legal(model: ir.Model, target: Target) -> None:
    """Refuses a graph that is not legal for a target.

    Raises:
        EmitError: names the layers, and says what each has that the opset or the parser lacks.
    """
    found = list(illegal_nodes(model, target))
    if found:
        more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
        raise EmitError(f"not legal for target {target.name}, opset {target.opset}: {'; '.join(found[:_SHOWN])}{more}")


def illegal_nodes(model: ir.Model, target: Target) -> Iterator[str]:
    """A sentence for every node that the target's opset or parser does not take."""
    for node in model.graph:
        problem = _schema_problem(node, target.opset)
        if not problem and target.parser is not None:
            problem = _parser_problem(node, target.parser, target.opset)
        if problem:
            yield f"{node.name or node.op_type}: {problem}"


def _schema_problem(node: ir.Node, opset: int) -> str:
    """What ONNX itself has against a node at an opset; custom domains have no schema to hold it against."""
    if node.domain not in {"", "ai.onnx"}:
        return ""
    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=opset, domain="")
    except onnx.defs.SchemaError:
        return f"opset {opset} has no {node.op_type}"
    unknown = [name for name in node.attributes if name not in schema.attributes]
    if unknown:
        return f"{node.op_type} of opset {opset} has no attribute {unknown[0]}"
    return next(_type_problems(node, schema, opset), "")


def _type_problems(node: ir.Node, schema: onnx.defs.OpSchema, opset: int) -> Iterator[str]:
    allowed = {item.type_param_str: set(item.allowed_type_strs) for item in schema.type_constraints}
    for values, parameters in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            if value is None or value.dtype is None or not parameters:
                continue
            # the last parameter of a variadic operator stands for all further values
            parameter = parameters[min(index, len(parameters) - 1)]
            types = allowed.get(parameter.type_str, {parameter.type_str})
            if _STRINGS[value.dtype.name] not in types:
                yield f"{node.op_type} of opset {opset} does not take {value.dtype.name} ({value_name(value)})"


def _parser_problem(node: ir.Node, parser: OnnxParser, opset: int) -> str:
    if node.op_type in _QUANTIZERS:
        return next(_quantizer_problems(node, parser), "")
    if node.op_type.startswith("TRT_"):
        return "" if parser.custom_operators else f"{parser.name} has no {node.op_type}"
    types = parser.operators.get(node.op_type)
    if types is None or node.domain not in {"", "ai.onnx"}:
        return f"{parser.name} has no {node.domain + '::' if node.domain else ''}{node.op_type}"
    if node.op_type == "GroupNormalization" and opset > parser.group_norm_opset:
        return f"{parser.name} has no GroupNormalization of opset {opset}; write it out"
    for index in parser.constant_inputs.get(node.op_type, ()):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and const_or_none(value) is None:
            return f"{parser.name} wants a constant as input {index} of {node.op_type}, not {value_name(value)}"
    return next(_element_problems(node, types, parser), "")


def _element_problems(node: ir.Node, types: frozenset[str], parser: OnnxParser) -> Iterator[str]:
    for value in node.inputs:
        if value is None or value.dtype is None or value.dtype.name in types:
            continue
        name = value.dtype.name
        if name in parser.quantized and node.op_type in _MOVES_CODES:
            continue
        if name in _IO_ONLY and node.op_type == "Cast" and value.is_graph_input():
            continue
        yield f"{parser.name} has no {node.op_type} of {name} ({value_name(value)})"


def _quantizer_problems(node: ir.Node, parser: OnnxParser) -> Iterator[str]:
    """The rules of NVIDIA's Q and DQ layers: symmetric, and scales that are known when the engine is built."""
    codes = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    if codes is not None and codes.dtype is not None and codes.dtype.name not in parser.quantized:
        yield f"{parser.name} does not quantize to {codes.dtype.name}"
    attribute = node.attributes.get("output_dtype")
    if node.op_type == "DequantizeLinear" and attribute is not None and not parser.dequantize_output_dtype:
        yield f"{parser.name} refuses output_dtype of a DequantizeLinear; put a Cast behind it"
    scale = const_or_none(node.inputs[1])
    if scale is None and not _is_block_scale(node.inputs[1]):
        yield f"the scale {value_name(node.inputs[1])} is computed; it must be a constant"
    elif scale is not None and not (scale > 0).all():
        yield "a scale is 0 or negative"
    yield from _zero_point_problems(node, 1 if scale is None else int(scale.size), attribute is not None)
    moving = node.inputs[0] is not None and const_or_none(node.inputs[0]) is None
    if scale is not None and scale.size > 1 and moving and _is_activation(node.inputs[0]):
        yield f"an activation has {scale.size} scales; use one"


def _is_block_scale(value: ir.Value | None) -> bool:
    """Whether a scale is that of NVFP4's blocks: codes in E4M3 times one constant."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear" or const_or_none(producer.inputs[1]) is None:
        return False
    codes = producer.inputs[0]
    return codes is not None and codes.dtype == ir.DataType.FLOAT8E4M3FN


def _zero_point_problems(node: ir.Node, scales: int, has_dtype: bool) -> Iterator[str]:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        if node.op_type == "QuantizeLinear" and not has_dtype:
            yield "a zero point (or output_dtype) must say the type of the codes: ONNX takes UINT8, TensorRT INT8"
        return
    zero = const_or_none(value)
    if zero is None:
        yield f"the zero point {value_name(value)} is computed; it must be a constant"
    elif zero.astype(float).any():
        yield "the zero point is not 0"
    elif zero.size != scales:
        yield f"{zero.size} zero points beside {scales} scales"


def _is_activation(value: ir.Value | None) -> bool:
    """Whether a value depends on an input of the network, through the nodes that a quantizer may have before it."""
    while value is not None and (producer := value.producer()) is not None:
        if const_or_none(value) is not None or producer.op_type not in {*_QUANTIZERS, "Cast", "Reshape", "Transpose"}:
            return const_or_none(value) is None
        value = producer.inputs[0]
    return value is not None and const_or_none(value) is None
