"""Changes to a compiled ONNX file, one at a time: constants, lookups, attributes, wires and nodes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

__all__ = ["Mutation", "mutations"]

Edit = Callable[[onnx.ModelProto], None]
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})
_SWAPPED = frozenset({"Concat", "Sub", "Div", "MatMul"})
_DROPPED = frozenset(
    {"Add", "Mul", "Sub", "Div", "Clip", "Round", "Sigmoid", "Gelu", "Erf", "Softmax", "LayerNormalization"}
)
_CHANGE = 0.1  # of an element, or of the tensor's mean size where that is larger


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """One change.

    Attributes:
        kind: what is changed.
        what: the changed thing, for people.
        modules: torch modules whose nodes read or make it.
        edit: makes the change.
    """

    kind: str
    what: str
    modules: frozenset[str]
    edit: Edit


def mutations(proto: onnx.ModelProto, source: random.Random) -> Iterator[Mutation]:
    """Every kind of change for everything in a file that it can be made to, in the file's order.

    Args:
        proto: the file; it is not changed.
        source: chooses elements.
    """
    readers: dict[str, set[str]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(_module(node))
    for tensor in proto.graph.initializer:
        modules = frozenset(readers.get(tensor.name, set()))
        if modules:
            yield from _of_constant(tensor, modules, source)
    shapes = _shapes(proto)
    for index, node in enumerate(proto.graph.node):
        yield from _of_node(index, node, shapes)


def _module(node: onnx.NodeProto) -> str:
    return str(node.name.rpartition("/")[0])


def _shapes(proto: onnx.ModelProto) -> dict[str, tuple[int, tuple[object, ...]]]:
    """Type and shape of every value that is known."""
    found = {}
    for info in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]:
        kind = info.type.tensor_type
        found[info.name] = (kind.elem_type, tuple(dim.dim_value or dim.dim_param for dim in kind.shape.dim))
    for tensor in proto.graph.initializer:
        found[tensor.name] = (tensor.data_type, tuple(tensor.dims))
    return found


def _of_constant(tensor: TensorProto, modules: frozenset[str], source: random.Random) -> Iterator[Mutation]:
    array = numpy_helper.to_array(tensor)
    if array.size == 0:
        return
    table = array.ndim == 2 and "rows" in tensor.name
    rows = range(array.shape[0]) if table else [None]
    for row in rows:
        place = tuple(source.randrange(size) for size in array.shape)
        place = place if row is None else (row, *place[1:])
        if array.dtype.kind == "f" and np.isnan(array[place]):
            continue
        kind = "row of a table" if table else _kind(tensor)
        yield Mutation(
            kind=kind,
            what=f"{tensor.name}{list(place)}",
            modules=modules,
            edit=partial(_change_element, tensor.name, place),
        )
    if table and array.shape[0] > 2:
        row, by = source.sample(range(array.shape[0] - 1), 2)
        yield Mutation(
            kind="row replaced",
            what=f"{tensor.name}: row {row} by row {by}",
            modules=modules,
            edit=partial(_replace_row, tensor.name, row, by),
        )


def _kind(tensor: TensorProto) -> str:
    if tensor.data_type in _FLOATS:
        return "number"
    if tensor.data_type == TensorProto.INT64:
        return "whole number"
    return "code"


def _initializer(proto: onnx.ModelProto, name: str) -> TensorProto:
    (found,) = [item for item in proto.graph.initializer if item.name == name]
    tensor: TensorProto = found
    return tensor


def _change_element(name: str, place: tuple[int, ...], proto: onnx.ModelProto) -> None:
    tensor = _initializer(proto, name)
    array = numpy_helper.to_array(tensor).copy()
    if array.dtype == np.bool_:
        array[place] = not array[place]
    elif tensor.data_type in _FLOATS:
        finite = array[np.isfinite(array)].astype(np.float64)
        size = float(np.sqrt(np.square(finite).mean())) if finite.size else 0.0
        array[place] += array.dtype.type(_CHANGE * max(abs(float(array[place])), size) or _CHANGE)
    elif array.dtype.kind == "i" and array.dtype.itemsize == 8:
        array[place] += 1 if array[place] < 1 else -1
    else:
        wide = array.astype(np.float32)
        wide[place] += -1 if wide[place] > 0 else 1
        array = wide.astype(array.dtype)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def _replace_row(name: str, row: int, by: int, proto: onnx.ModelProto) -> None:
    tensor = _initializer(proto, name)
    array = numpy_helper.to_array(tensor).copy()
    array[row] = array[by]
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def _of_node(
    index: int, node: onnx.NodeProto, shapes: dict[str, tuple[int, tuple[object, ...]]]
) -> Iterator[Mutation]:
    modules = frozenset({_module(node)})
    if node.op_type in _SWAPPED and len(node.input) > 1:
        yield Mutation(
            kind="inputs exchanged", what=node.name, modules=modules, edit=partial(_exchange, index)
        )
    same = bool(node.input) and shapes.get(node.input[0], 0) == shapes.get(node.output[0], 1)
    if node.op_type in _DROPPED and same:
        yield Mutation(kind="node dropped", what=node.name, modules=modules, edit=partial(_drop, index))
    if any(item.name == "epsilon" for item in node.attribute):
        yield Mutation(kind="epsilon", what=node.name, modules=modules, edit=partial(_epsilon, index))


def _exchange(index: int, proto: onnx.ModelProto) -> None:
    node = proto.graph.node[index]
    node.input[0], node.input[1] = node.input[1], node.input[0]


def _drop(index: int, proto: onnx.ModelProto) -> None:
    node = proto.graph.node[index]
    source, gone = node.input[0], node.output[0]
    for other in proto.graph.node:
        for position, name in enumerate(other.input):
            if name == gone:
                other.input[position] = source


def _epsilon(index: int, proto: onnx.ModelProto) -> None:
    next(item for item in proto.graph.node[index].attribute if item.name == "epsilon").f *= 10
