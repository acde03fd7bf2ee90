"""Typed reads of a graph: what is missing is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qdexport.core.layer_names import layers_of
from qdexport.errors import GraphPassError
from qdexport.graph.dialect import CODE_FORMAT, DOMAIN, FAKE_QUANTIZE, LAYER_KEY, SCALED_FOR_KEY, SEQUENCE_FIRST_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "COMPUTE_OPS",
    "code_format",
    "compute_consumers",
    "const_of",
    "const_or_none",
    "dtype_of",
    "graph_of",
    "input_of",
    "int_attr",
    "ints_attr",
    "is_fake_quantize",
    "is_merged",
    "module_of",
    "note_scaled_for",
    "only_consumer",
    "scaled_for",
    "sequence_first",
    "shape_of",
    "value_name",
    "weight_source",
]

COMPUTE_OPS = frozenset({"Conv", "MatMul", "Gemm"})


def value_name(value: ir.Value | None) -> str:
    """A printable name."""
    return "(absent)" if value is None else value.name or "(unnamed)"


def input_of(node: ir.Node, index: int) -> ir.Value:
    """An input that must be there. Raises ``GraphPassError`` naming the node."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise GraphPassError(f"{node.name} ({node.op_type}) has no input {index}")
    return value


def const_or_none(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of an initializer or a Constant node's output; None for anything computed."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def const_of(node: ir.Node, index: int) -> np.ndarray:
    """A constant input. Raises ``GraphPassError`` naming the node when it is absent or computed."""
    value = input_of(node, index)
    array = const_or_none(value)
    if array is None:
        raise GraphPassError(f"{node.name} ({node.op_type}): input {index}, {value_name(value)}, is not constant")
    return array


def int_attr(node: ir.Node, name: str, default: int | None = None) -> int:
    """An integer attribute. Raises ``GraphPassError`` when it is absent and has no default."""
    attribute = node.attributes.get(name)
    if attribute is None:
        if default is None:
            raise GraphPassError(f"{node.name} ({node.op_type}) has no attribute {name!r}")
        return default
    return attribute.as_int()


def ints_attr(node: ir.Node, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    """A list of integers."""
    attribute = node.attributes.get(name)
    return default if attribute is None else tuple(attribute.as_ints())


def dtype_of(value: ir.Value) -> ir.DataType:
    """The element type. Raises ``GraphPassError`` when it is unknown."""
    if value.dtype is None:
        raise GraphPassError(f"the type of {value_name(value)} is unknown; capture the model again")
    return value.dtype


def shape_of(value: ir.Value) -> ir.Shape:
    """The shape (dimensions may be symbols). Raises ``GraphPassError`` when the rank is unknown."""
    if value.shape is None:
        raise GraphPassError(f"the shape of {value_name(value)} is unknown; capture the model again")
    return value.shape


def graph_of(node: ir.Node) -> ir.Graph:
    """The main graph a node is in."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise GraphPassError(f"{node.name} is not part of the main graph")
    return graph


def module_of(node: ir.Node) -> str:
    """The path of the torch module that a node came from; empty for the denoiser itself."""
    return node.metadata_props.get(LAYER_KEY, "")


def scaled_for(node: ir.Node) -> list[tuple[str, int]]:
    """The layers whose ``1 / r`` the output of a convolution or product carries, and from which channel on (pass
    fold-reparam).
    """
    found = []
    for part in node.metadata_props.get(SCALED_FOR_KEY, "").split(","):
        layer, separator, first = part.rpartition(":")
        if separator:
            found.append((layer, int(first)))
    return found


def note_scaled_for(node: ir.Node, layer: str, first: int) -> None:
    """Notes for :func:`scaled_for` that the channels from ``first`` on carry a layer's ``1 / r``."""
    known = node.metadata_props.get(SCALED_FOR_KEY, "")
    node.metadata_props[SCALED_FOR_KEY] = f"{known},{layer}:{first}".lstrip(",")


def sequence_first(node: ir.Node) -> bool:
    """Whether a product reads tokens as [length, batch, width] (pass sequence-first)."""
    return SEQUENCE_FIRST_KEY in node.metadata_props


def is_fake_quantize(node: ir.Node | None) -> bool:
    """Whether a node is ``qdexport::FakeQuantize``."""
    return node is not None and node.domain == DOMAIN and node.op_type == FAKE_QUANTIZE


def code_format(node: ir.Node) -> str:
    """What the codes of a FakeQuantize are: ``int``, ``fp8`` or ``nvfp4``."""
    attribute = node.attributes.get(CODE_FORMAT)
    return "int" if attribute is None else attribute.as_string()


def is_merged(node: ir.Node) -> bool:
    """Whether a product computes several layers (pass merge-projections)."""
    return len(layers_of(module_of(node))) > 1


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The node that alone reads a value; None when there are several, or the value is a graph output."""
    readers = {use.node for use in value.uses()}
    return readers.pop() if len(readers) == 1 and not value.is_graph_output() else None


def compute_consumers(value: ir.Value) -> Iterator[ir.Node]:
    """The convolutions and matrix products that read a value as their first operand."""
    for use in value.uses():
        if use.node.op_type in COMPUTE_OPS and use.idx == 0:
            yield use.node


def weight_source(node: ir.Node) -> ir.Node | None:
    """The FakeQuantize or DequantizeLinear behind a compute node's second operand, through Transpose and Cast."""
    producer = input_of(node, 1).producer()
    while producer is not None and producer.op_type in {"Transpose", "Cast"}:
        producer = input_of(producer, 0).producer()
    if producer is not None and (is_fake_quantize(producer) or producer.op_type == "DequantizeLinear"):
        return producer
    return None
