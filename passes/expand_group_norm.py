"""Writes GroupNorm out with FP32 sums where the target then makes fewer or smaller kernels of it.

Before: ``x -> Reshape[N, G, L] -> InstanceNormalization -> Reshape -> y``
After, ``two-pass``: ``x -> Reshape[N, G, L] -> Cast -> ReduceMean, Sub, Mul, ReduceMean, Add eps, Sqrt, Div -> Cast
-> Reshape -> y``
After, ``channel-parts``: mean and variance of every channel, joined by sums of ``K = C/G`` slices, then ``Sub, Div``
over ``Reshape[N, G, L, 1]``

Identity: ``(x - mean) / sqrt(mean((x - mean)^2) + eps)`` over each group, the operator's own definition (its scale is 1
and its bias 0 here; the affine part follows in the graph). With mean ``m_k`` and variance ``v_k`` of channel ``k`` of a
group, ``mean = sum_k m_k / K`` and ``variance = sum_k (v_k + (m_k - mean)^2) / K`` (Chan, Golub, LeVeque 1979, parts of
equal size). Exact up to the order of sums.

Written out in two passes, TensorRT-RTX fuses the convolution's epilogue before, the normalization, SiLU and the
quantizer behind it into one kernel while a group is small; the operator costs two or three. With channels as parts it
makes two of any size: one writes the tensor and the channels' sums, the other joins them and normalizes. It joins them
there because slices are summed elementwise; a ReduceMean over the K channels would be a kernel of its own. The tensor
is cast twice, in two shapes, because a cast that both kernels share would be stored, in FP32. Which form an operator
gets is looked up by its shape (:mod:`qdexport.core.forms`); ``qdexport search`` measures it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.graph.dimension import size_of
from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.forms import mark_site, what_follows
from qdexport.graph.query import const_or_none, dtype_of, graph_of, input_of, module_of, shape_of
from qdexport.graph.runner import WhyNot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qdexport.core.forms import Signature
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["ExpandGroupNorm"]

_DEFAULT_EPSILON = 1e-5


class ExpandGroupNorm:
    """Replaces InstanceNormalization where another form was measured to be better, at the largest size it may have."""

    name: ClassVar[str] = "expand-group-norm"
    exact: ClassVar[bool] = True
    up_to: ClassVar[str] = "the order of sums"
    runs_after: ClassVar[tuple[str, ...]] = ()
    operator: ClassVar[str] = "group-norm"
    forms: ClassVar[tuple[str, ...]] = ("operator", "two-pass", "channel-parts")
    default: ClassVar[str] = "operator"

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        largest = {dim.name: dim.high for dim in context.io.dynamic_dims}
        for node in list(model.graph):
            if node.op_type != "InstanceNormalization":
                continue
            elements = _elements(input_of(node, 0), largest)
            reason = _why_not(node, elements)
            if elements is None or reason:
                report.skipped.append(WhyNot(node.name or "", reason))
                continue
            signature = mark_site(node, self.operator, _signature(node, elements))
            choice = context.form_of(self.operator, signature, self.default)
            report.chosen[module_of(node)] = choice.why
            if choice.form == "operator":
                continue
            image = _image(node) if choice.form == "channel-parts" else None
            _expand(node, image)
            report.touched.append(module_of(node))
        if report.touched:
            remove_unused(model)


def _why_not(node: ir.Node, elements: int | None) -> str:
    scale, bias = const_or_none(input_of(node, 1)), const_or_none(input_of(node, 2))
    if scale is None or bias is None or not (scale == 1).all() or bias.any():
        return "its own scale and bias are not 1 and 0"
    return "the size of a group is not known before it runs" if elements is None else ""


def _elements(x: ir.Value, largest: Mapping[str, int]) -> int | None:
    """How many elements a group has, at the largest sizes; a size that is left over by a Reshape is what it reads."""
    dims = list(shape_of(x))
    sizes = [size_of(dim, largest) for dim in dims[2:]]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        return math.prod(known)
    producer = x.producer()
    if producer is None or producer.op_type != "Reshape" or not isinstance(dims[1], int):
        return None
    source = [size_of(dim, largest) for dim in list(shape_of(input_of(producer, 0)))[1:]]
    known = [size for size in source if size is not None]
    return math.prod(known) // dims[1] if len(known) == len(source) else None


def _image(node: ir.Node) -> ir.Value | None:
    """The ``[N, C, H, W]`` whose groups of several channels are flattened in front of the operator; else None. Height
    and width may be known at run time only.
    """
    reshape = input_of(node, 0).producer()
    if reshape is None or reshape.op_type != "Reshape":
        return None
    source = input_of(reshape, 0)
    dims = list(shape_of(source))
    groups = list(shape_of(input_of(node, 0)))
    if len(dims) != 4 or len(groups) != 3 or not isinstance(dims[1], int) or not isinstance(groups[1], int):
        return None
    channels, count = dims[1], groups[1]
    return source if dims[0] == groups[0] and channels % count == 0 and channels > count else None


def _signature(node: ir.Node, elements: int) -> Signature:
    """Type, what follows, elements of a group at its largest, channels, and images where their number is fixed."""
    x = input_of(node, 0)
    batch = shape_of(x)[0]
    signature: Signature = {
        "dtype": "fp16" if dtype_of(x) == ir.DataType.FLOAT16 else "fp32",
        "then": what_follows(node.outputs[0]),
        "elements": elements,
    }
    channels = _channels(node)
    signature |= {"channels": channels} if channels is not None else {}
    return signature | ({"batch": batch} if isinstance(batch, int) else {})


def _channels(node: ir.Node) -> int | None:
    """Those of the image that is cut into groups; the groups themselves where nothing is cut."""
    x = input_of(node, 0)
    reshape = x.producer()
    source = input_of(reshape, 0) if reshape is not None and reshape.op_type == "Reshape" else x
    rank = 4 if source is not x else len(shape_of(x))
    dim = shape_of(source)[1] if len(shape_of(source)) == rank else shape_of(x)[1]
    return dim if isinstance(dim, int) else None


def _whole(dim: int | ir.SymbolicDim) -> int:
    return int(str(dim))


def _expand(node: ir.Node, image: ir.Value | None) -> None:
    """Writes a norm out: by the channels of ``image``, or in two passes where it is None."""
    x = input_of(node, 0)
    writer = NodeWriter(node)
    epsilon = node.attributes.get("epsilon")
    eps = writer.constant("epsilon", np.float32(_DEFAULT_EPSILON if epsilon is None else epsilon.as_float()))
    centred, variance = _two_pass(writer, x) if image is None else _by_channel(writer, x, image)
    deviation = writer.op("Sqrt", [writer.op("Add", [variance, eps], like=variance)], like=variance)
    y = writer.cast(writer.op("Div", [centred, deviation], like=centred), dtype_of(x))
    if image is not None:
        y = _reshaped(writer, y, list(shape_of(x))[1:])
    replace_value(node.outputs[0], y)
    graph_of(node).remove(node, safe=True)


def _two_pass(writer: NodeWriter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    axes = list(range(2, len(shape_of(x))))
    wide = writer.cast(x, ir.DataType.FLOAT)
    centred = writer.op("Sub", [wide, _mean(writer, wide, axes)], like=wide)
    return centred, _mean(writer, writer.op("Mul", [centred, centred], like=wide), axes)


def _by_channel(writer: NodeWriter, x: ir.Value, image: ir.Value) -> tuple[ir.Value, ir.Value]:
    """``x - mean`` as ``[N, G, L, 1]``, and the variance ``[N, G, 1, 1]``."""
    _, groups, size = shape_of(x)
    parts = _whole(shape_of(image)[1]) // _whole(groups)
    wide = writer.cast(image, ir.DataType.FLOAT)
    means = _mean(writer, wide, [2, 3])
    residues = writer.op("Sub", [wide, means], like=wide)
    variances = _mean(writer, writer.op("Mul", [residues, residues], like=wide), [2, 3])
    mean_parts, variance_parts = (
        writer.many(
            "Split",
            [_reshaped(writer, value, [groups, parts, 1])],
            {"axis": 2, "num_outputs": parts},
            [[shape_of(x)[0], groups, 1, 1]] * parts,
        )
        for value in (means, variances)
    )
    share = writer.constant("share", np.float32(1 / parts))
    mean = writer.op("Mul", [_sum(writer, mean_parts), share], like=mean_parts[0])
    spread = []
    for part, variance in zip(mean_parts, variance_parts, strict=True):
        offset = writer.op("Sub", [part, mean], like=mean)
        spread.append(writer.op("Add", [variance, writer.op("Mul", [offset, offset], like=mean)], like=mean))
    joined = writer.op("Mul", [_sum(writer, spread), share], like=mean)
    again = writer.cast(_reshaped(writer, image, [groups, size, 1]), ir.DataType.FLOAT)
    return writer.op("Sub", [again, mean], like=again), joined


def _sum(writer: NodeWriter, values: Sequence[ir.Value]) -> ir.Value:
    """A balanced tree of sums."""
    level = list(values)
    while len(level) > 1:
        pairs = [writer.op("Add", level[at : at + 2], like=level[at]) for at in range(0, len(level) - 1, 2)]
        level = pairs + ([level[-1]] if len(level) % 2 else [])
    return level[0]


def _reshaped(writer: NodeWriter, value: ir.Value, shape: Sequence[int | ir.SymbolicDim]) -> ir.Value:
    """A Reshape of everything but the images; one size may be known at run time only."""
    sizes = [dim if isinstance(dim, int) else -1 for dim in shape]
    target = writer.constant("shape", np.array([0, *sizes], np.int64))
    return writer.op("Reshape", [value, target], dtype=value.dtype, shape=[shape_of(value)[0], *shape])


def _mean(writer: NodeWriter, value: ir.Value, axes: list[int]) -> ir.Value:
    where = writer.constant("axes", np.array(axes, np.int64))
    shape = [1 if axis in axes else dim for axis, dim in enumerate(shape_of(value))]
    return writer.op("ReduceMean", [value, where], {"keepdims": 1}, dtype=ir.DataType.FLOAT, shape=shape)
