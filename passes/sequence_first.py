"""Lays the tokens of transformer blocks out as [length, batch, width], so that attention reads its heads in place.

Before: ``[N, C, H, W] -> Transpose -> Reshape[N, L, C] -> rows -> Reshape[N, L, h, D] -> Transpose[N, h, L, D]``
After:  ``[N, C, H, W] -> Transpose -> Reshape[L, N, C] -> rows -> Reshape[L, N, h, D] -> Transpose[N, h, L, D]``

Identity: norms, products with weights and everything elementwise treat every token alike, so the order of tokens does
not matter between the borders, where the transpositions that are there anyway change their permutation. Nothing but
data moves: exact up to the order of sums, which a library may choose by the layout. For several images at once,
attention wants [N h, L, D]; of [L, N, C] that is a strided view, of [N, L, C] it is not, and TensorRT-RTX then
transposes what it reads in a kernel of its own, or splits the norm in front of it in two to do it there. Whether a
region is laid out so is looked up by its size (:mod:`qdexport.core.forms`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.errors import GraphPassError
from qdexport.graph.dialect import SEQUENCE_FIRST_KEY
from qdexport.graph.dimension import size_of
from qdexport.graph.edit import NodeWriter, remove_unused
from qdexport.graph.forms import mark_site
from qdexport.graph.query import const_or_none, dtype_of, input_of, int_attr, ints_attr, module_of, shape_of
from qdexport.graph.runner import WhyNot

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qdexport.core.forms import Signature
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["SequenceFirst"]

# elementwise, or over the last axis alone
_BY_TOKEN = frozenset(
    {
        "Add", "Cast", "Clip", "DequantizeLinear", "Div", "Erf", "FakeQuantize", "Gelu", "LayerNormalization", "MatMul",
        "Mul", "QuantizeLinear", "Round", "Sigmoid", "Split", "Sub", "Tanh",
    }
)  # fmt: skip
_HEADS: dict[tuple[int, ...], tuple[int, ...]] = {(0, 2, 1, 3): (1, 2, 0, 3), (0, 2, 3, 1): (1, 2, 3, 0)}


@dataclass(slots=True)
class _Region:
    """What hangs together: tokens, and the nodes at the borders."""

    tokens: set[ir.Value] = field(default_factory=set)
    entries: list[ir.Node] = field(default_factory=list)
    exits: list[ir.Node] = field(default_factory=list)
    to_heads: list[ir.Node] = field(default_factory=list)
    from_heads: list[ir.Node] = field(default_factory=list)


class _ImpossibleError(Exception):
    """Why a region stays as it is."""


class SequenceFirst:
    """Changes the borders of every region of tokens between two transpositions."""

    name: ClassVar[str] = "sequence-first"
    exact: ClassVar[bool] = True
    up_to: ClassVar[str] = "the order of sums"
    runs_after: ClassVar[tuple[str, ...]] = ("plain-attention",)
    operator: ClassVar[str] = "tokens"
    forms: ClassVar[tuple[str, ...]] = ("batch-first", "sequence-first")
    default: ClassVar[str] = "batch-first"

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        seen: set[ir.Value] = set()
        for node in list(model.graph):
            if _is_patches(node):
                report.skipped.append(WhyNot(node.name or "", "tokens of patches stay [batch, length, width]"))
            if not _is_entry(node) or node.outputs[0] in seen:
                continue
            try:
                region = _region(node)
            except _ImpossibleError as reason:
                report.skipped.append(WhyNot(node.name or "", str(reason)))
                continue
            seen |= region.tokens
            if region.to_heads and self._chosen(node, region, context, report):
                _rewrite(region)
                report.touched.append(module_of(node))
        if report.touched:
            remove_unused(model)

    def _chosen(self, entry: ir.Node, region: _Region, context: PassContext, report: PassReport) -> bool:
        largest = {dim.name: dim.high for dim in context.io.dynamic_dims}
        signature = mark_site(entry, self.operator, _signature(region, largest))
        choice = context.form_of(self.operator, signature, self.default)
        report.chosen[module_of(entry)] = choice.why
        return choice.form == "sequence-first"


def _signature(region: _Region, largest: Mapping[str, int]) -> Signature:
    """Type, and at the largest sizes length, heads and width of the tokens, and images of a call."""
    tokens = region.entries[0].outputs[0]
    batch, length, width = shape_of(tokens)
    heads = shape_of(region.to_heads[0].outputs[0])[2]
    sizes = {"length": length, "heads": heads, "width": width, "batch": batch}
    known = {name: size for name, dim in sizes.items() if (size := size_of(dim, largest)) is not None}
    return {"dtype": "fp16" if dtype_of(tokens) == ir.DataType.FLOAT16 else "fp32", **known}


def _dims(value: ir.Value, rank: int) -> list[int | str]:
    """Numbers, and names of dynamic dimensions; nothing where the rank is another, or a dimension is unknown."""
    dims = [dim if isinstance(dim, int) else dim.value for dim in shape_of(value)]
    known = [dim if isinstance(dim, int) else str(dim) for dim in dims if dim is not None]
    return known if len(known) == len(dims) == rank else []


def _is_entry(node: ir.Node) -> bool:
    """A Reshape ``[N, H, W, C] -> [N, L, C]`` behind the transposition from ``[N, C, H, W]``, of several images."""
    if node.op_type != "Reshape":
        return False
    source = input_of(node, 0).producer()
    if source is None or source.op_type != "Transpose" or ints_attr(source, "perm") != (0, 2, 3, 1):
        return False
    before, after = _dims(input_of(node, 0), 4), _dims(node.outputs[0], 3)
    return bool(before and after) and before[0] == after[0] != 1 and before[3] == after[2]


def _is_patches(node: ir.Node) -> bool:
    """A Transpose ``[N, C, L] -> [N, L, C]`` behind the Reshape of a patch embedding, of several images.

    What follows (norms that are modulated per image, joins with the text's tokens) reads the batch as the first axis.
    """
    if node.op_type != "Transpose" or ints_attr(node, "perm") != (0, 2, 1):
        return False
    source = input_of(node, 0).producer()
    if source is None or source.op_type != "Reshape":
        return False
    before, after = _dims(input_of(source, 0), 4), _dims(input_of(node, 0), 3)
    return bool(before and after) and before[:2] == after[:2] and before[0] != 1


def _region(entry: ir.Node) -> _Region:
    region = _Region()
    batch, length = _dims(entry.outputs[0], 3)[:2]
    waiting = [entry.outputs[0]]
    while waiting:
        value = waiting.pop()
        if value in region.tokens:
            continue
        if _dims(value, 3)[:2] != [batch, length]:
            raise _ImpossibleError(f"{value.name} of shape {value.shape} has other tokens")
        if value.is_graph_output():
            raise _ImpossibleError(f"{value.name} is an output of the network")
        region.tokens.add(value)
        waiting.extend(_made_of(value, region))
        for use in value.uses():
            waiting.extend(_read_by(use.node, use.idx, region))
    return region


def _made_of(value: ir.Value, region: _Region) -> Iterator[ir.Value]:
    """Tokens that a token is made of; notes the borders."""
    node = value.producer()
    if node is None:
        raise _ImpossibleError(f"{value.name} is no result of a node")
    if node.op_type in _BY_TOKEN:
        yield from _operands(node)
    elif _is_entry(node):
        region.entries.append(_border(node))
    elif _is_from_heads(node):
        region.from_heads.append(_border(node))
    else:
        raise _ImpossibleError(f"{node.name} ({node.op_type}) makes tokens in a way that is not known")


def _operands(node: ir.Node) -> Iterator[ir.Value]:
    """The operands that are tokens; all others must be the same for every token."""
    if node.op_type == "LayerNormalization" and int_attr(node, "axis", -1) not in {-1, 2}:
        raise _ImpossibleError(f"{node.name} normalizes over more than a token")
    row = node.inputs[3] if node.op_type == "FakeQuantize" and len(node.inputs) > 3 else None
    if row is not None and list(shape_of(row)) != [1]:
        raise _ImpossibleError(f"{module_of(node)} has a row of its step table per image")
    if node.op_type == "Split" and int_attr(node, "axis", 0) not in {-1, 2}:
        raise _ImpossibleError(f"{node.name} splits tokens from each other")
    for index, operand in enumerate(node.inputs):
        if operand is None:
            continue
        rank = len(shape_of(operand))
        if rank == 3 and not (node.op_type == "MatMul" and index == 1):
            dims = list(shape_of(operand))
            if dims[:2] == [1, 1]:
                continue
            yield operand
        elif rank > 2 or (rank == 2 and node.op_type != "MatMul"):
            raise _ImpossibleError(f"{node.name} ({node.op_type}) reads {operand.name} of shape {operand.shape}")


def _read_by(node: ir.Node, index: int, region: _Region) -> Iterator[ir.Value]:
    """Tokens that a reader makes; notes the borders."""
    if node.op_type in _BY_TOKEN:
        if node.op_type == "MatMul" and index != 0:
            raise _ImpossibleError(f"{node.name} multiplies by tokens")
        yield from node.outputs
        return
    if node.op_type != "Reshape":
        raise _ImpossibleError(f"{node.name} ({node.op_type}) reads tokens in a way that is not known")
    readers = [use.node for use in node.outputs[0].uses()]
    perms = {ints_attr(reader, "perm") if reader.op_type == "Transpose" else () for reader in readers}
    before, after = _dims(input_of(node, 0), 3), _dims(node.outputs[0], 4)
    if after and after[:2] == before[:2] and perms <= set(_HEADS):
        region.to_heads.append(_border(node))
    elif after and after[0] == before[0] and after[3] == before[2] and perms == {(0, 3, 1, 2)}:
        region.exits.append(_border(node))
    else:
        raise _ImpossibleError(f"{node.name} reshapes tokens to {node.outputs[0].shape}")


def _border(node: ir.Node) -> ir.Node:
    """A Reshape whose sizes can be put in another order."""
    sizes = const_or_none(input_of(node, 1))
    if sizes is not None and not sizes.all():
        raise _ImpossibleError(f"{node.name} copies a size by its place")
    return node


def _is_from_heads(node: ir.Node) -> bool:
    source = input_of(node, 0).producer() if node.op_type == "Reshape" else None
    if source is None or source.op_type != "Transpose" or ints_attr(source, "perm") != (0, 2, 1, 3):
        return False
    before, after = _dims(input_of(node, 0), 4), _dims(node.outputs[0], 3)
    return bool(before and after) and before[:2] == after[:2]


def _rewrite(region: _Region) -> None:
    for value in region.tokens:
        batch, length, width = _dims(value, 3)
        value.shape = ir.Shape([length, batch, width])
        for use in value.uses():
            if use.node.op_type == "MatMul":
                use.node.metadata_props[SEQUENCE_FIRST_KEY] = "1"
    for node in dict.fromkeys(region.entries):
        images, height, width, channels = _dims(input_of(node, 0), 4)
        _behind(node, (2, 3, 0, 1), [height, width, images, channels])
        _reshape(node, (1, 0, 2))
    for node in dict.fromkeys(region.from_heads):
        images, length, heads, depth = _dims(input_of(node, 0), 4)
        _behind(node, (2, 0, 1, 3), [length, images, heads, depth])
        _reshape(node, (1, 0, 2))
    for node in dict.fromkeys(region.to_heads):
        _before(node, (1, 0, 2, 3))
    for node in dict.fromkeys(region.exits):
        _before(node, (1, 2, 0, 3))


def _behind(node: ir.Node, perm: tuple[int, ...], shape: list[int | str]) -> None:
    """Lets a border's Reshape read the same source through another transposition."""
    source = input_of(node, 0).producer()
    if source is None:
        raise GraphPassError(f"{node.name} reads no transposition")
    value = input_of(source, 0)
    moved = NodeWriter(node).op("Transpose", [value], {"perm": list(perm)}, dtype=value.dtype, shape=ir.Shape(shape))
    node.replace_input_with(0, moved)


def _reshape(node: ir.Node, order: tuple[int, ...]) -> None:
    """Puts the sizes that a Reshape reads in another order: numbers, or what is computed when the network runs."""
    writer = NodeWriter(node)
    sizes, numbers = input_of(node, 1), const_or_none(input_of(node, 1))
    if numbers is not None:
        node.replace_input_with(1, writer.constant("sequence_first", numbers[list(order)]))
        return
    places = writer.constant("sequence_first", np.array(order, np.int64))
    moved = writer.op("Gather", [sizes, places], {"axis": 0}, dtype=ir.DataType.INT64, shape=[len(order)])
    node.replace_input_with(1, moved)


def _before(node: ir.Node, order: tuple[int, ...]) -> None:
    """Gives a border's Reshape another shape, and its transpositions the permutation that undoes it."""
    dims = list(shape_of(node.outputs[0]))
    node.outputs[0].shape = ir.Shape([dims[axis] for axis in order])
    _reshape(node, order)
    for use in list(node.outputs[0].uses()):
        old = ints_attr(use.node, "perm")
        perm = _HEADS.get(old, (2, 3, 0, 1))
        use.node.attributes["perm"] = ir.AttrInt64s("perm", list(perm))
