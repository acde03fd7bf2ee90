"""Lets the quantizers of a split convolution read the parts of a concatenation before they are joined.

Before: ``Concat(hidden, skip) [-> Mul r] -> Split -> FakeQuantize_i -> conv_i``, then Add
After:  ``hidden [-> Mul r_0] -> FakeQuantize_0 -> conv_0``, ``skip [-> Mul r_1] -> FakeQuantize_1 -> conv_1``, then Add

Identity: a concatenation cut at its seams gives its operands back, and factors per channel can be cut as well. Exact.
A concatenation of differently scaled tensors makes the convolution behind it a floating-point one; two convolutions
stay integer. The Concat stays for whoever else reads it (the normalization in front of the resnet's first layer).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.graph.edit import NodeWriter, remove_unused
from qdexport.graph.query import (
    const_of,
    const_or_none,
    dtype_of,
    input_of,
    int_attr,
    is_fake_quantize,
    module_of,
    shape_of,
    value_name,
)
from qdexport.graph.runner import WhyNot

if TYPE_CHECKING:
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["SplitShortcut"]

_PART = re.compile(r".+\.input_quantizers\.\d+")


@dataclass(frozen=True, slots=True)
class _Cut:
    """Elements ``start`` to ``end`` of ``source`` along ``axis``."""

    source: ir.Value
    axis: int
    start: int
    end: int


class SplitShortcut:
    """Bypasses the Split (or Slices) and the Concat where they meet at the seams."""

    name: ClassVar[str] = "split-shortcut"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ("share-quantizers",)

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        for node in list(model.graph):
            if not is_fake_quantize(node) or _PART.fullmatch(module_of(node)) is None:
                continue
            cut = _cut_of(input_of(node, 0))
            if cut is None:
                continue  # nothing is cut: the quantizer reads a tensor of its own already
            between, joined = _scaling(cut)
            part, reason = _part_of(joined, cut)
            if part is None:
                report.skipped.append(WhyNot(node.name or "", reason))
                continue
            for item in reversed(between):
                part = _repeat(node, item, part, cut)
            node.replace_input_with(0, part)
            report.touched.append(module_of(node))
        if report.touched:
            remove_unused(model)


def _cut_of(value: ir.Value) -> _Cut | None:
    """What a Split's output or a Slice takes of its input; None for any other value, or bounds that are computed."""
    producer = value.producer()
    if producer is None or producer.op_type not in {"Split", "Slice"}:
        return None
    source = input_of(producer, 0)
    rank = len(shape_of(source))
    if producer.op_type == "Split":
        axis = int_attr(producer, "axis", 0) % rank
        widths = [list(shape_of(out))[axis] for out in producer.outputs]
        sizes = [width for width in widths if isinstance(width, int)]
        index = producer.outputs.index(value)
        return _Cut(source, axis, sum(sizes[:index]), sum(sizes[: index + 1])) if len(sizes) == len(widths) else None
    starts, ends, axes, steps = (
        const_or_none(producer.inputs[index]) if len(producer.inputs) > index else np.array([default])
        for index, default in enumerate((0, 0, 0, 1), 1)
    )
    if starts is None or ends is None or axes is None or steps is None or len(axes) != 1 or steps[0] != 1:
        return None
    axis = int(axes[0]) % rank
    total = list(shape_of(source))[axis]
    if not isinstance(total, int):
        return None
    start, end, _ = slice(int(starts[0]), int(ends[0])).indices(total)
    return _Cut(source, axis, start, end)


def _scaling(cut: _Cut) -> tuple[list[ir.Node], ir.Value]:
    """The factors per channel (and casts) in front of a cut, nearest first, and the tensor that they begin with."""
    nodes, value = [], cut.source
    while (producer := value.producer()) is not None:
        if producer.op_type == "Mul" and (constant := _constant_input(producer)) is not None:
            source = input_of(producer, 1 - constant)
        elif producer.op_type == "Cast":
            source = input_of(producer, 0)
        else:
            break
        if list(shape_of(source)) != list(shape_of(value)):
            break  # the factor spreads the tensor, so that its parts are not those of the product
        nodes.append(producer)
        value = source
    return nodes, value


def _constant_input(node: ir.Node) -> int | None:
    """The position of the only constant operand."""
    constant = [index for index, item in enumerate(node.inputs) if const_or_none(item) is not None]
    return constant[0] if len(constant) == 1 else None


def _part_of(joined: ir.Value, cut: _Cut) -> tuple[ir.Value | None, str]:
    """The operand of a Concat that a cut gives back, or why there is none."""
    concat = joined.producer()
    if concat is None or concat.op_type != "Concat":
        return None, f"{value_name(joined)} is cut here, but it is not a concatenation; the cut stays"
    rank = len(shape_of(joined))
    if int_attr(concat, "axis") % rank != cut.axis:
        return None, f"{concat.name} joins another axis than the one that is cut; the cut stays"
    seams: list[int | str] = [0]
    for index in range(len(concat.inputs)):
        part = input_of(concat, index)
        width, start = list(shape_of(part))[cut.axis], seams[-1]
        if not isinstance(width, int) or not isinstance(start, int):
            return None, f"{concat.name} joins parts of unknown width; the cut stays"
        if (start, start + width) == (cut.start, cut.end):
            return part, ""
        seams.append(start + width)
    listed = ", ".join(map(str, seams))
    return (
        None,
        f"channels {cut.start} to {cut.end} are cut, but the seams of {concat.name} are {listed}; the cut stays",
    )


def _repeat(anchor: ir.Node, node: ir.Node, part: ir.Value, cut: _Cut) -> ir.Value:
    """A Mul or Cast in front of the cut, done again behind it."""
    writer = NodeWriter(anchor, module_of(node))
    constant = _constant_input(node)
    if constant is None:
        return writer.cast(part, dtype_of(node.outputs[0]))
    factor = const_of(node, constant)
    axis = cut.axis - (len(shape_of(part)) - factor.ndim)
    if axis >= 0 and factor.shape[axis] != 1:
        factor = np.take(factor, np.arange(cut.start, cut.end), axis)
    return writer.op("Mul", [part, writer.constant("factor", factor)], like=part)
