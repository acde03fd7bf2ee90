"""Moves the activation side ``1 / r`` of a channel scale into what makes the activation.

Before: ``norm(gamma, beta) -> Mul(1 / r) -> FakeQuantize -> op``
After:  ``norm(gamma / r, beta / r) -> FakeQuantize -> op``

Identity: a factor per channel commutes with data movement, with the gate of GEGLU and with ``P V``
(:mod:`qdexport.passes.channel_paths`), and ``(x gamma + beta) / r = x (gamma / r) + beta / r``; for a layer whose
weight is quantized per output channel ``codes (s / r)`` has the same codes. So it goes into the affine part of a
LayerNorm or GroupNorm, into ``to_v`` for ``to_out.0`` (also where the first token is projected apart), or into the
value half of ``ff.net.0.proj`` for ``ff.net.2``, when nothing else reads what is scaled. SiLU, residual sums and the
text stand in the way: there ``1 / r`` stays in front of the quantizer as its multiplier, which builders put into the
quantizing kernel.

Exact algebra, but not exact numbers: new constants are products in float64, rounded once to their type, in place of a
product rounded at run time. A code may so differ where ``x / s`` is within a rounding of a tie. For powers of two
nothing is rounded, and every code is equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.graph.dialect import SCALED_FOR_KEY
from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.query import (
    COMPUTE_OPS,
    const_or_none,
    int_attr,
    ints_attr,
    is_fake_quantize,
    module_of,
    only_consumer,
    shape_of,
    value_name,
)
from qdexport.graph.runner import WhyNot
from qdexport.passes.channel_paths import Blocked, channel_scales_behind, is_channel_scale, possible_sources

if TYPE_CHECKING:
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["FoldReparam"]


@dataclass(frozen=True, slots=True)
class _Edit:
    """A constant operand of a node and the numbers that replace it."""

    node: ir.Node
    index: int
    array: np.ndarray


@dataclass(frozen=True, slots=True)
class _Absorbed:
    """A factor per channel of a tensor, taken in by what makes it.

    Attributes:
        axis: the channel axis of the tensor.
        edits: what has to change.
        first: the maker's first channel that is scaled (others before and behind are kept by a factor of 1).
    """

    axis: int
    edits: tuple[_Edit, ...]
    first: int = 0


@dataclass(frozen=True, slots=True)
class _Fold:
    """Products with ``1 / r`` that go away together."""

    scales: list[ir.Node]
    absorbed: _Absorbed


class FoldReparam:
    """Removes products with ``1 / r`` where norms or layers take them in; says for each layer where they went."""

    name: ClassVar[str] = "fold-reparam"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = ("split-shortcut", "fold-adapters")

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        pending = [node for node in model.graph if is_channel_scale(node)]
        while pending:
            node = pending[0]
            fold = _plan(node)
            if isinstance(fold, Blocked):
                pending.remove(node)
                report.skipped.append(WhyNot(node.name or "", fold.reason))
                for layer in _layers(node):
                    report.notes[layer] = f"1 / r stays in front of the quantizer: {fold.reason}"
                continue
            _commit(fold, report)
            pending = [item for item in pending if item not in fold.scales]
        if report.touched:
            remove_unused(model)


def _plan(node: ir.Node) -> _Fold | Blocked:
    """Where one product could go; the reason of the nearest candidate when nowhere."""
    vector = _vector(node)
    value = next(item for item in node.inputs if item is not None and const_or_none(item) is None)
    why: Blocked | None = None
    for source in possible_sources(value):
        absorbed = _absorb(source, vector)
        if isinstance(absorbed, _Absorbed):
            scales = channel_scales_behind(source, absorbed.axis)
            if not isinstance(scales, Blocked):
                if all(np.array_equal(_vector(item), vector) for item in scales):
                    return _Fold(scales, absorbed)
                scales = Blocked(f"the layers that read {_maker(source)} have different channel scales")
            absorbed = scales
        why = why or absorbed
    return why or Blocked("no layer makes its input: it comes from an input of the network")


def _maker(value: ir.Value) -> str:
    """The node behind a tensor, by name."""
    node = value.producer()
    return value_name(value) if node is None or not node.name else node.name


def _vector(node: ir.Node) -> np.ndarray:
    """``1 / r``, float64 ``[C]``."""
    (constant,) = (array for value in node.inputs if (array := const_or_none(value)) is not None)
    return constant.reshape(-1).astype(np.float64)


def _layers(scale: ir.Node) -> list[str]:
    """The layers whose quantizers read a product with ``1 / r``."""
    pending, found = [scale], []
    while pending:
        for use in pending.pop().outputs[0].uses():
            if use.node.op_type in COMPUTE_OPS:
                found.append(module_of(use.node))
            elif is_fake_quantize(use.node) or use.node.op_type == "Cast":
                pending.append(use.node)
    return sorted(set(found)) or [module_of(scale).rpartition(".")[0]]


def _commit(fold: _Fold, report: PassReport) -> None:
    layers = sorted({layer for scale in fold.scales for layer in _layers(scale)})
    edits = fold.absorbed.edits
    for edit in edits:
        writer = NodeWriter(edit.node)
        edit.node.replace_input_with(edit.index, writer.constant("scaled", edit.array))
    makers = sorted({module_of(edit.node).removesuffix(".weight_quantizer") for edit in edits})
    for node in _compute_nodes(edits):
        node.metadata_props[SCALED_FOR_KEY] = f"{layers[0]}:{fold.absorbed.first}"
    for scale in fold.scales:
        data = next(item for item in scale.inputs if item is not None and const_or_none(item) is None)
        replace_value(scale.outputs[0], data)
    report.touched.extend(layers)
    for layer in layers:
        report.notes[layer] = f"1 / r folded into {', '.join(makers)}"


def _compute_nodes(edits: tuple[_Edit, ...]) -> list[ir.Node]:
    """The convolutions and products whose outputs are scaled."""
    found = []
    for edit in edits:
        node: ir.Node | None = edit.node
        while node is not None and node.op_type in {"DequantizeLinear", "Cast", "Transpose"}:
            node = only_consumer(node.outputs[0])
        if node is not None and node.op_type in COMPUTE_OPS:
            found.append(node)
    return found


def _absorb(value: ir.Value, vector: np.ndarray) -> _Absorbed | Blocked:
    """Edits that multiply the channels of ``value`` with ``vector``.

    The caller sees to what reads ``value``; what is in between must be read by nothing else.
    """
    node = value.producer()
    if node is None:
        return Blocked(f"{value_name(value)} is an input of the network")
    if node.op_type == "LayerNormalization":
        return _absorb_layer_norm(node, vector)
    if node.op_type == "Split":
        return _absorb_split(node, value, vector)
    if node.op_type == "Concat":
        return _absorb_concat(node, vector)
    if node.op_type in {"Add", "Mul"}:
        return _absorb_affine(node, vector)
    if node.op_type in COMPUTE_OPS:
        return _absorb_layer(node, vector)
    return Blocked(f"{node.name} makes it, and a {node.op_type} takes no factor per channel in")


def _scaled(array: np.ndarray, vector: np.ndarray, trailing: int) -> np.ndarray:
    """``array`` times a factor along the axis before ``trailing`` others, rounded once to the type of ``array``."""
    wide = vector.reshape([-1] + [1] * trailing)
    return np.asarray(array.astype(np.float64) * wide).astype(array.dtype)


def _absorb_layer_norm(node: ir.Node, vector: np.ndarray) -> _Absorbed | Blocked:
    rank = len(shape_of(node.outputs[0]))
    arrays = [const_or_none(value) for value in node.inputs[1:3] if value is not None]
    if int_attr(node, "axis", -1) % rank != rank - 1 or len(node.outputs) > 1:
        return Blocked(f"{node.name} does not normalize the last axis alone")
    edits = []
    for index, array in enumerate(arrays, 1):
        if array is None or array.shape != vector.shape:
            return Blocked(f"{node.name} has an affine part that is not constant")
        edits.append(_Edit(node, index, _scaled(array, vector, 0)))
    return _Absorbed(rank - 1, tuple(edits))


def _absorb_split(node: ir.Node, value: ir.Value, vector: np.ndarray) -> _Absorbed | Blocked:
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
    inner = _absorb(source, full)
    if isinstance(inner, _Absorbed) and inner.axis != axis:
        return Blocked(f"{node.name} splits along another axis than the channels")
    return inner if isinstance(inner, Blocked) else replace(inner, first=start)


def _absorb_concat(node: ir.Node, vector: np.ndarray) -> _Absorbed | Blocked:
    """All parts of a tensor that is joined along another axis (the first token beside the rest)."""
    rank = len(shape_of(node.outputs[0]))
    joined = int_attr(node, "axis") % rank
    edits: list[_Edit] = []
    axes = set()
    for part in node.inputs:
        if part is None or only_consumer(part) is not node:
            return Blocked(f"{value_name(part)} is read by others than {node.name}")
        inner = _absorb(part, vector)
        if isinstance(inner, Blocked):
            return inner
        axes.add(inner.axis)
        edits += inner.edits
    if len(axes) != 1 or joined in axes:
        return Blocked(f"{node.name} joins channels")
    return _Absorbed(axes.pop(), tuple(edits))


def _absorb_affine(node: ir.Node, vector: np.ndarray) -> _Absorbed | Blocked:
    """``x * gamma``, or ``x + beta`` where ``x`` takes the factor in too."""
    rank = len(shape_of(node.outputs[0]))
    places = [index for index, value in enumerate(node.inputs) if const_or_none(value) is not None]
    if len(places) != 1:
        return Blocked(f"{node.name} joins it with something computed")
    constant, data = const_or_none(node.inputs[places[0]]), node.inputs[1 - places[0]]
    if constant is None or data is None or constant.ndim > rank or len(shape_of(data)) != rank:
        return Blocked(f"{node.name} stretches its operand")
    if node.op_type == "Mul":
        axes = [rank - constant.ndim + axis for axis, size in enumerate(constant.shape) if size > 1]
        if len(axes) == 1 and constant.size == len(vector):
            edit = _Edit(node, places[0], _scaled(constant, vector, rank - 1 - axes[0]))
            return _Absorbed(axes[0], (edit,))
    if only_consumer(data) is not node:
        return Blocked(f"{value_name(data)} is read by others than {node.name}")
    inner = _absorb(data, vector)
    if isinstance(inner, Blocked) or node.op_type == "Mul":
        return inner
    beta = _scaled(constant, vector, rank - 1 - inner.axis)
    return replace(inner, edits=(*inner.edits, _Edit(node, places[0], beta)))


def _absorb_layer(node: ir.Node, vector: np.ndarray) -> _Absorbed | Blocked:
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
        edits.append(_Edit(node, 2, _scaled(bias, vector, 0)))
    return _Absorbed(axis, tuple(edits))


def _weight_edit(node: ir.Node, axis: int, vector: np.ndarray) -> _Edit | Blocked:
    """The scales of a weight quantized per output channel, or the rows of one that is not quantized."""
    reader, index = node, 1
    while True:
        value = reader.inputs[index]
        array = const_or_none(value)
        if array is not None:
            if array.shape[axis] != len(vector):
                return Blocked(f"{node.name} does not have {len(vector)} output channels")
            return _Edit(reader, index, _scaled(array, vector, array.ndim - 1 - axis))
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
    return _Edit(maker, 1, _scaled(scale, vector, 0))
