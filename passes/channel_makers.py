"""What makes a tensor takes a factor per channel of it in: norms, layers, tables, and sums and products of those.

Used by :mod:`qdexport.passes.fold_reparam`, whose docstring has the identities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qdexport.graph.query import (
    COMPUTE_OPS,
    const_or_none,
    int_attr,
    ints_attr,
    only_consumer,
    shape_of,
    value_name,
)
from qdexport.passes.channel_paths import Blocked

__all__ = ["Absorbed", "Edit", "absorb"]


@dataclass(frozen=True, slots=True)
class Edit:
    """A constant operand of a node that is multiplied.

    Attributes:
        node: reads the constant.
        index: of the operand.
        array: what it is.
        factor: float64, broadcasts with the array.
        first: the first channel of a layer's output that the factor changes.
    """

    node: ir.Node
    index: int
    array: np.ndarray
    factor: np.ndarray
    first: int = 0


@dataclass(frozen=True, slots=True)
class Absorbed:
    """A factor per channel of a tensor, taken in by what makes it.

    Attributes:
        axis: the channel axis of the tensor.
        edits: what has to change.
    """

    axis: int
    edits: tuple[Edit, ...]


def absorb(value: ir.Value, vector: np.ndarray) -> Absorbed | Blocked:
    """Edits that multiply the channels of ``value`` with ``vector``.

    The caller sees to what reads ``value``; what is in between must be read by nothing else.
    """
    node = value.producer()
    if node is None:
        return Blocked(f"{value_name(value)} is an input of the network")
    if node.op_type == "LayerNormalization":
        return _absorb_layer_norm(node, vector)
    if node.op_type in {"Unsqueeze", "Reshape", "Cast"}:
        return _absorb_view(node, vector)
    if node.op_type == "Gather":
        return _absorb_table(node, vector)
    if node.op_type == "Split":
        return _absorb_split(node, value, vector)
    if node.op_type == "Concat":
        return _absorb_concat(node, vector)
    if node.op_type in {"Add", "Mul"}:
        return _absorb_affine(node, vector)
    if node.op_type in COMPUTE_OPS:
        return _absorb_layer(node, vector)
    return Blocked(f"{node.name} makes it, and a {node.op_type} takes no factor per channel in")


def _edit(node: ir.Node, index: int, array: np.ndarray, vector: np.ndarray, trailing: int) -> Edit:
    """``array`` times a factor along the axis before ``trailing`` others."""
    return Edit(node, index, array, vector.reshape([-1] + [1] * trailing))


def _absorb_view(node: ir.Node, vector: np.ndarray) -> Absorbed | Blocked:
    """The same numbers with other axes in front of the channels, or of another type."""
    source, out = node.inputs[0], node.outputs[0]
    if source is None or only_consumer(source) is not node:
        return Blocked(f"{value_name(source)} is read by others than {node.name}")
    before, after = list(shape_of(source)), list(shape_of(out))
    if not before or before[-1] != after[-1] or after[-1] != len(vector):
        return Blocked(f"{node.name} does not keep the channels apart")
    inner = absorb(source, vector)
    if isinstance(inner, Absorbed) and inner.axis != len(before) - 1:
        return Blocked(f"{node.name} does not keep the channels apart")
    return inner if isinstance(inner, Blocked) else replace(inner, axis=len(after) - 1)


def _absorb_table(node: ir.Node, vector: np.ndarray) -> Absorbed | Blocked:
    """Columns of a table of constants, of which a row is looked up (pass fold-time-embedding)."""
    table = const_or_none(node.inputs[0])
    if table is None or table.ndim != 2 or int_attr(node, "axis", 0) != 0 or table.shape[1] != len(vector):
        return Blocked(f"{node.name} looks nothing up that is constant and has these channels")
    return Absorbed(len(shape_of(node.outputs[0])) - 1, (_edit(node, 0, table, vector, 0),))


def _absorb_layer_norm(node: ir.Node, vector: np.ndarray) -> Absorbed | Blocked:
    rank = len(shape_of(node.outputs[0]))
    arrays = [const_or_none(value) for value in node.inputs[1:3] if value is not None]
    if int_attr(node, "axis", -1) % rank != rank - 1 or len(node.outputs) > 1:
        return Blocked(f"{node.name} does not normalize the last axis alone")
    edits = []
    for index, array in enumerate(arrays, 1):
        if array is None or array.shape != vector.shape:
            return Blocked(f"{node.name} has an affine part that is not constant")
        edits.append(_edit(node, index, array, vector, 0))
    return Absorbed(rank - 1, tuple(edits))


def _absorb_split(node: ir.Node, value: ir.Value, vector: np.ndarray) -> Absorbed | Blocked:
    """Part of the channels of the tensor that is split; the others keep their size."""
    source = node.inputs[0]
    if source is None or only_consumer(source) is not node:
        return Blocked(f"{value_name(source)} is read by others than {node.name}")
    axis = int_attr(node, "axis", 0) % len(shape_of(value))
    sizes = [shape_of(part)[axis] for part in node.outputs]
    widths = [size for size in sizes if isinstance(size, int)]
    place = list(node.outputs).index(value)
    if len(widths) != len(sizes) or widths[place] != len(vector):
        return Blocked(f"{node.name} splits along another axis than the channels")
    start = sum(widths[:place])
    full = np.ones(sum(widths))
    full[start : start + len(vector)] = vector
    inner = absorb(source, full)
    if isinstance(inner, Absorbed) and inner.axis != axis:
        return Blocked(f"{node.name} splits along another axis than the channels")
    if isinstance(inner, Blocked):
        return inner
    return replace(inner, edits=tuple(replace(edit, first=start) for edit in inner.edits))


def _absorb_concat(node: ir.Node, vector: np.ndarray) -> Absorbed | Blocked:
    """All parts of a tensor that is joined along another axis (the first token beside the rest)."""
    rank = len(shape_of(node.outputs[0]))
    joined = int_attr(node, "axis") % rank
    edits: list[Edit] = []
    axes = set()
    for part in node.inputs:
        if part is None or only_consumer(part) is not node:
            return Blocked(f"{value_name(part)} is read by others than {node.name}")
        inner = absorb(part, vector)
        if isinstance(inner, Blocked):
            return inner
        axes.add(inner.axis)
        edits += inner.edits
    if len(axes) != 1 or joined in axes:
        return Blocked(f"{node.name} joins channels")
    return Absorbed(axes.pop(), tuple(edits))


def _absorb_affine(node: ir.Node, vector: np.ndarray) -> Absorbed | Blocked:
    """``x * gamma``, or ``x + beta`` where ``x`` takes the factor in too."""
    rank = len(shape_of(node.outputs[0]))
    places = [index for index, value in enumerate(node.inputs) if const_or_none(value) is not None]
    if not places:
        return _absorb_modulation(node, vector)
    if len(places) != 1:
        return Blocked(f"{node.name} joins constants")
    constant, data = const_or_none(node.inputs[places[0]]), node.inputs[1 - places[0]]
    if constant is None or data is None or constant.ndim > rank or len(shape_of(data)) != rank:
        return Blocked(f"{node.name} stretches its operand")
    if node.op_type == "Mul":
        axes = [rank - constant.ndim + axis for axis, size in enumerate(constant.shape) if size > 1]
        if len(axes) == 1 and constant.size == len(vector):
            edit = _edit(node, places[0], constant, vector, rank - 1 - axes[0])
            return Absorbed(axes[0], (edit,))
    if only_consumer(data) is not node:
        return Blocked(f"{value_name(data)} is read by others than {node.name}")
    inner = absorb(data, vector)
    if isinstance(inner, Blocked) or node.op_type == "Mul":
        return inner
    beta = _edit(node, places[0], constant, vector, rank - 1 - inner.axis)
    return replace(inner, edits=(*inner.edits, beta))


def _absorb_modulation(node: ir.Node, vector: np.ndarray) -> Absorbed | Blocked:
    """A product of two computed tensors, one of which takes the factor in, or a sum of which both do (adaLN)."""
    found: list[Absorbed] = []
    why: Blocked | None = None
    # a norm has a weight of its own, which costs nothing
    operands = sorted((value for value in node.inputs if value is not None), key=lambda value: not _is_norm(value))
    if node.op_type == "Add" and not any(_is_modulated(value) for value in operands):
        return Blocked(f"{node.name} joins it with something computed")
    for value in operands:
        inner = _absorb_operand(node, value, vector)
        if isinstance(inner, Absorbed):
            found.append(inner)
        why = why or (inner if isinstance(inner, Blocked) else None)
    if node.op_type == "Mul" and found:
        return found[0]
    if why is not None or not found:
        return why or Blocked(f"{node.name} joins it with something computed")
    if len({item.axis for item in found}) != 1:
        return Blocked(f"{node.name} joins channels along several axes")
    return Absorbed(found[0].axis, tuple(edit for item in found for edit in item.edits))


def _absorb_operand(node: ir.Node, value: ir.Value, vector: np.ndarray) -> Absorbed | Blocked:
    """One operand of a sum or product, which may be stretched along axes other than the channels."""
    if only_consumer(value) is not node or list(node.inputs).count(value) != 1:
        return Blocked(f"{value_name(value)} is read by others than {node.name}")
    dims, rank = list(shape_of(value)), len(shape_of(node.outputs[0]))
    inner = absorb(value, vector)
    if isinstance(inner, Blocked):
        return inner
    if dims[inner.axis] != len(vector):
        return Blocked(f"{node.name} stretches the channels of {value_name(value)}")
    return replace(inner, axis=inner.axis + rank - len(dims))


def _is_norm(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "LayerNormalization"


def _is_modulated(value: ir.Value) -> bool:
    """Whether a value is a norm times something: a sum of other things is that of a residual connection."""
    node = value.producer()
    if node is None or node.op_type != "Mul":
        return False
    return any(item is not None and _is_norm(item) for item in node.inputs)


def _absorb_layer(node: ir.Node, vector: np.ndarray) -> Absorbed | Blocked:
    """Output rows of a convolution or product with a constant weight, and a bias inside the node."""
    rank = len(shape_of(node.outputs[0]))
    if node.op_type == "Conv":
        weight_axis, axis = 0, 1
    else:
        weight_axis, axis = int(node.op_type == "MatMul" or not int_attr(node, "transB", 0)), rank - 1
        if node.inputs[1] is None or len(shape_of(node.inputs[1])) != 2:
            return Blocked(f"{node.name} makes it, and its second operand is not a weight")
    weight = _weight_edit(node, weight_axis, vector)
    if isinstance(weight, Blocked):
        return weight
    edits = [weight]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = const_or_none(node.inputs[2])
        if bias is None:
            return Blocked(f"{node.name} has a bias that is not constant")
        edits.append(_edit(node, 2, bias, vector, 0))
    return Absorbed(axis, tuple(edits))


def _weight_edit(node: ir.Node, axis: int, vector: np.ndarray) -> Edit | Blocked:
    """The scales of a weight quantized per output channel, or the rows of one that is not quantized."""
    reader, index = node, 1
    while True:
        value = reader.inputs[index]
        array = const_or_none(value)
        if array is not None:
            if array.shape[axis] != len(vector):
                return Blocked(f"{node.name} does not have {len(vector)} output channels")
            return _edit(reader, index, array, vector, array.ndim - 1 - axis)
        maker = None if value is None else value.producer()
        if value is None or maker is None or only_consumer(value) is None:
            return Blocked(f"{node.name} makes it, and its weight is not its own")
        if maker.op_type == "DequantizeLinear":
            break
        if maker.op_type == "Transpose":
            axis = ints_attr(maker, "perm", tuple(reversed(range(len(shape_of(value))))))[axis]
        elif maker.op_type != "Cast":
            return Blocked(f"{node.name} makes it, and its weight comes out of a {maker.op_type}")
        reader, index = maker, 0
    scale = const_or_none(maker.inputs[1])
    if scale is None or scale.shape != vector.shape or int_attr(maker, "axis", 1) != axis:
        return Blocked(f"{node.name} makes it, and its weight does not have one scale per output channel")
    return _edit(maker, 1, scale, vector, 0)
