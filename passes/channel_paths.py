"""Follows the channels of a tensor through the data movement of a network.

A factor per channel commutes with everything that only moves or weighs elements of one channel: Reshape, Transpose,
Cast, Slice and Split along other axes, the product with another tensor (the gate of GEGLU) and the product ``P V`` of
attention, which weighs tokens and leaves value channels apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import onnx_ir as ir

from qdexport.graph.dialect import CHANNEL_SCALE
from qdexport.graph.query import const_or_none, ints_attr, module_of, shape_of, value_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Dimension = int | ir.SymbolicDim

__all__ = ["Blocked", "Channels", "channel_scales_behind", "is_channel_scale", "possible_sources"]

_UNARY = frozenset({"Cast", "Identity", "Reshape", "Transpose", "Slice"})


@dataclass(frozen=True, slots=True)
class Blocked:
    """Why channels cannot be followed, or a factor cannot be taken in."""

    reason: str


@dataclass(frozen=True, slots=True)
class Channels:
    """The axes of a tensor that hold channels.

    Attributes:
        strides: by axis; the channel of an element is the sum of ``index * stride`` over these axes.
    """

    strides: tuple[tuple[int, int], ...]

    def is_axis(self, axis: int) -> bool:
        """Whether one axis alone holds the channels, in order."""
        return self.strides == ((axis, 1),)


def is_channel_scale(node: ir.Node) -> bool:
    """Whether a node is the product with ``1 / r`` in front of a layer's input quantizer."""
    return (
        node.op_type == "Mul"
        and module_of(node).rpartition(".")[2] == CHANNEL_SCALE
        and sum(const_or_none(value) is not None for value in node.inputs) == 1
    )


def possible_sources(value: ir.Value) -> Iterator[ir.Value]:
    """The tensors, upstream of data movement, whose channels reach ``value``, nearest operand first."""
    node = value.producer()
    if node is None:
        return
    computed = [item for item in node.inputs if item is not None and const_or_none(item) is None]
    if node.op_type in _UNARY:
        yield from possible_sources(computed[0])
    elif node.op_type == "Mul" and len(computed) == 2:
        for item in computed:
            yield from possible_sources(item)
    elif node.op_type == "MatMul" and len(computed) == 2 and not _is_weight(computed[1]):
        yield from possible_sources(computed[1])
    else:
        yield value


def _is_weight(value: ir.Value) -> bool:
    """Whether a computed operand is a dequantized or transposed constant."""
    node = value.producer()
    while node is not None and node.op_type in {"Cast", "Transpose"} and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return const_or_none(value) is not None or (node is not None and node.op_type == "DequantizeLinear")


def channel_scales_behind(source: ir.Value, axis: int) -> list[ir.Node] | Blocked:
    """The channel-scale products that are all that reads ``source``, directly or behind data movement.

    Args:
        source: a tensor.
        axis: its channel axis, not negative.

    Returns:
        The products, whose constants all lie along the same channels in order; or why there is something else.
    """
    found: list[ir.Node] = []
    reached: dict[ir.Value, Channels] = {source: Channels(((axis, 1),))}
    pending = [source]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return Blocked(f"{value_name(value)} is an output of the network")
        for use in value.uses():
            if is_channel_scale(use.node):
                if not _covers(use.node, use.idx, reached[value]):
                    return Blocked(f"{use.node.name} does not scale the channels of {value_name(source)} in order")
                found.append(use.node)
                continue
            if use.node.op_type in {"Shape", "Size"}:
                continue
            step = _through(use.node, use.idx, reached[value])
            if isinstance(step, Blocked):
                return step
            out = use.node.outputs[0]
            if out in reached:
                return Blocked(f"{use.node.name} reads {value_name(source)} with both operands")
            reached[out] = step
            pending.append(out)
    return list(dict.fromkeys(found))


def _covers(node: ir.Node, index: int, channels: Channels) -> bool:
    """Whether a channel scale's constant varies along the channels, and along nothing else."""
    constant = const_or_none(node.inputs[1 - index])
    value = node.inputs[index]
    if constant is None or value is None:
        return False
    offset = len(shape_of(value)) - constant.ndim
    axes = [offset + axis for axis, size in enumerate(constant.shape) if size > 1]
    return len(axes) == 1 and channels.is_axis(axes[0])


def _through(node: ir.Node, index: int, channels: Channels) -> Channels | Blocked:
    """The channels in the output of a node that reads them as operand ``index``."""
    moved: Channels | None = None
    if node.op_type in {"Cast", "Identity"}:
        moved = channels
    elif node.op_type == "Transpose":
        moved = _transposed(node, channels)
    elif node.op_type == "Reshape" and index == 0:
        moved = _reshaped(shape_of(node.inputs[0]), shape_of(node.outputs[0]), channels)  # type: ignore[arg-type]
    elif node.op_type == "Slice" and index == 0:
        moved = _sliced(node, channels)
    elif node.op_type == "Mul":
        moved = _times(node, index, channels)
    elif node.op_type == "MatMul" and index == 1 and const_or_none(node.inputs[0]) is None:
        moved = _weighed(node, channels)
    if moved is None:
        return Blocked(f"{node.name} reads it too, and no factor per channel passes through that {node.op_type}")
    return moved


def _transposed(node: ir.Node, channels: Channels) -> Channels:
    perm = ints_attr(node, "perm", tuple(reversed(range(len(shape_of(node.outputs[0]))))))
    return Channels(tuple(sorted((perm.index(axis), stride) for axis, stride in channels.strides)))


def _sliced(node: ir.Node, channels: Channels) -> Channels | None:
    axes = const_or_none(node.inputs[3]) if len(node.inputs) > 3 else None
    if axes is None:
        return None
    rank = len(shape_of(node.outputs[0]))
    cut = {int(axis) % rank for axis in axes}
    return None if cut & {axis for axis, _ in channels.strides} else channels


def _times(node: ir.Node, index: int, channels: Channels) -> Channels | None:
    """The other factor may be anything that does not stretch the tensor."""
    value = node.inputs[index]
    if value is None or len(shape_of(value)) != len(shape_of(node.outputs[0])):
        return None
    sizes, out = list(shape_of(value)), list(shape_of(node.outputs[0]))
    return channels if all(_same(a, b) for a, b in zip(sizes, out, strict=True)) else None


def _weighed(node: ir.Node, channels: Channels) -> Channels | None:
    """``P V`` for V of the output's rank: rows of V are summed over, its last axis and its batch axes stay."""
    value = node.inputs[1]
    rank = len(shape_of(node.outputs[0]))
    if value is None or len(shape_of(value)) != rank or any(axis == rank - 2 for axis, _ in channels.strides):
        return None
    sizes, out = list(shape_of(value)), list(shape_of(node.outputs[0]))
    return channels if all(_same(sizes[axis], out[axis]) for axis, _ in channels.strides) else None


def _same(a: Dimension, b: Dimension) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return a == b
    return a.value is not None and a.value == b.value


def _reshaped(before: ir.Shape, after: ir.Shape, channels: Channels) -> Channels | None:
    """Aligns blocks of axes of equal size; a block that holds channels must hold nothing else."""
    strides = dict(channels.strides)
    moved: dict[int, int] = {}
    for old, new in _blocks(_long_axes(before), _long_axes(after)):
        if not any(axis in strides for axis, _ in old):
            continue
        if len(old) == len(new) == 1:
            moved[new[0][0]] = strides[old[0][0]]
            continue
        stride = _joint_stride([(size, strides.get(axis)) for axis, size in old])
        for axis, size in reversed(new):
            if stride is None or not isinstance(size, int):
                return None
            moved[axis] = stride
            stride *= size
    return Channels(tuple(sorted(moved.items())))


def _long_axes(shape: ir.Shape) -> list[tuple[int, Dimension]]:
    """Axis and size where the size is not 1."""
    return [(axis, size) for axis, size in enumerate(shape) if size != 1]


def _joint_stride(axes: Sequence[tuple[Dimension, int | None]]) -> int | None:
    """The stride of several axes as one axis; None when they are not one run of channels."""
    first = expected = axes[-1][1]
    for size, stride in reversed(axes):
        if expected is None or stride != expected or not isinstance(size, int):
            return None
        expected = stride * size
    return first


def _blocks(
    before: list[tuple[int, Dimension]], after: list[tuple[int, Dimension]]
) -> Iterator[tuple[list[tuple[int, Dimension]], list[tuple[int, Dimension]]]]:
    """Pairs of runs of axes that hold the same elements; sizes unknown before the network runs make runs longer."""
    shorter = min(len(before), len(after))
    head = 0
    while head < shorter and _same(before[head][1], after[head][1]):
        head += 1
    tail = 0
    while tail < shorter - head and _same(before[-1 - tail][1], after[-1 - tail][1]):
        tail += 1
    for old, new in zip(before[:head], after[:head], strict=True):
        yield [old], [new]
    yield from _middle_blocks(before[head : len(before) - tail], after[head : len(after) - tail])
    for old, new in zip(before[len(before) - tail :], after[len(after) - tail :], strict=True):
        yield [old], [new]


def _middle_blocks(
    before: list[tuple[int, Dimension]], after: list[tuple[int, Dimension]]
) -> Iterator[tuple[list[tuple[int, Dimension]], list[tuple[int, Dimension]]]]:
    """The shortest runs between equal ends; what stands in front of sizes that are all known is one run."""
    known = _known_tail(before), _known_tail(after)
    if _elements(known[0]) != _elements(known[1]):
        yield before, after
        return
    if len(known[0]) < len(before) or len(known[1]) < len(after):
        yield before[: len(before) - len(known[0])], after[: len(after) - len(known[1])]
    before, after = known
    while before and after:
        old, new = [before.pop(0)], [after.pop(0)]
        while (have := _elements(old)) != (need := _elements(new)):
            if have is None or need is None:
                return
            if have < need:
                old.append(before.pop(0))
            else:
                new.append(after.pop(0))
        yield old, new


def _known_tail(axes: list[tuple[int, Dimension]]) -> list[tuple[int, Dimension]]:
    """The last axes, as far as their sizes are known."""
    unknown = [place for place, (_, size) in enumerate(axes) if not isinstance(size, int)]
    return axes[unknown[-1] + 1 :] if unknown else list(axes)


def _elements(axes: list[tuple[int, Dimension]]) -> int | None:
    """How many elements a run of axes has; None when that is only known when the network runs."""
    sizes = [size for _, size in axes if isinstance(size, int)]
    return prod(sizes) if len(sizes) == len(axes) else None
