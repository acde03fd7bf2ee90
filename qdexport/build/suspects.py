"""Finds the nodes of an ONNX graph that are known to upset the builder when its own message names none."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

__all__ = ["int4_convolutions", "int4_products", "node_quoted_in", "runtime_scales"]

_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_PASSIVE = frozenset({"DequantizeLinear", "Cast", "Transpose", "Reshape"})
_INT4 = frozenset({onnx.TensorProto.INT4, onnx.TensorProto.UINT4})


def runtime_scales(graph: onnx.GraphProto) -> list[str]:
    """Names of quantizer nodes whose scale depends on a network input."""
    constant = {tensor.name for tensor in graph.initializer} | {""}
    found = []
    for node in graph.node:  # in topological order, as our own files are
        if all(name in constant for name in node.input):
            constant.update(node.output)
        if node.op_type in _QUANTIZERS and node.input[1] not in constant:
            found.append(node.name)
    return found


def int4_convolutions(graph: onnx.GraphProto) -> list[str]:
    """Names of convolutions with 4-bit weights."""
    return _with_int4_weights(graph, {"Conv", "ConvTranspose"})


def int4_products(graph: onnx.GraphProto) -> list[str]:
    """Names of matrix products with 4-bit weights."""
    return _with_int4_weights(graph, {"MatMul", "Gemm"})


def node_quoted_in(text: str, graph: onnx.GraphProto) -> str:
    """The node that a message speaks of, by its own name or as the first reader of a tensor."""
    nodes = _longest(text, (node.name for node in graph.node))
    if nodes:
        return nodes
    tensor = _longest(text, (initializer.name for initializer in graph.initializer))
    return next((node.name for node in graph.node if tensor in node.input), "") if tensor else ""


def _longest(text: str, names: Iterable[str]) -> str:
    words = set(_words(text))
    return max((name for name in names if name in words), key=len, default="")


def _words(text: str) -> Iterable[str]:
    # a name ends at anything that no torch path holds; a dot or colon after it belongs to the sentence
    for word in "".join(char if char.isalnum() or char in "_./#-" else " " for char in text).split():
        yield word
        yield word.rstrip(".")


def _with_int4_weights(graph: onnx.GraphProto, operators: set[str]) -> list[str]:
    narrow = {tensor.name for tensor in graph.initializer if tensor.data_type in _INT4}
    made_by = {output: node for node in graph.node for output in node.output}

    def holds_int4(name: str) -> bool:
        while name in made_by and made_by[name].op_type in _PASSIVE:
            name = made_by[name].input[0]
        return name in narrow

    return [node.name for node in graph.node if node.op_type in operators and holds_int4(node.input[1])]
