"""Makes one product of linear layers that read one tensor: queries, keys and values; those of the text.

Before: ``q(x) -> MatMul(Wq)``, ``q(x) -> MatMul(Wk)``, ``q(x) -> MatMul(Wv)``
After:  ``q(x) -> MatMul([Wq Wk Wv]) -> Split``

Identity: ``x [A B] = [x A, x B]``; codes, scales and biases lie side by side and stay what they are. Exact up to the
order of sums.
TensorRT-RTX merges such products itself only where constants allow it: never with INT4 weights, which it unpacks for
each product; and with a scale per channel, or a row of a step table, it writes a kernel behind each of the layers.
Behind one product there is one for all. The scales per channel must then stand behind the product (pass lower-bitwidth
does that): in front of it, the builder moves the Split through them and multiplies floats.

Layers whose weight alone is quantized are merged where their INT8 weights have scales per block: the builder merges
those of one input itself, and widens their codes at build time, so that the engine holds them in the body's type.

Layers keep their names: the product is called ``a.to_q+a.to_k+a.to_v``, and its Split has one output for each.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.core.layer_names import merged_name
from qdexport.graph.dialect import LAYER_KEY
from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.query import (
    const_of,
    const_or_none,
    dtype_of,
    graph_of,
    input_of,
    int_attr,
    is_fake_quantize,
    module_of,
    only_consumer,
    scaled_for,
    sequence_first,
    shape_of,
    weight_source,
)
from qdexport.graph.runner import WhyNot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["MergeProjections"]

_LONGEST_NAME = 3900  # TensorRT refuses names above 4,096 characters; kinds and numbers of nodes follow the modules


@dataclass(frozen=True, slots=True)
class _Linear:
    """One linear layer: its product, what stands behind the product as its bias, and its weight.

    Attributes:
        product: a MatMul.
        last: the Add of its bias, or the product itself.
        bias: FP ``[N]``, or None.
        codes: INT8 or INT4 ``[K, N]``.
        scale: FP32 ``[N]``, or one number; of blocks ``[K / block, N]``, in the type of the product.
        dtype: the type of the codes.
        block: input features that share a scale; 0: all.
    """

    product: ir.Node
    last: ir.Node
    bias: np.ndarray | None
    codes: np.ndarray
    scale: np.ndarray
    dtype: ir.DataType
    block: int = 0

    @property
    def width(self) -> int:
        """Output features."""
        return int(self.codes.shape[1])


class MergeProjections:
    """Merges linear layers that read one quantizer, where the target gains by it."""

    name: ClassVar[str] = "merge-projections"
    exact: ClassVar[bool] = True
    up_to: ClassVar[str] = "the order of sums"
    runs_after: ClassVar[tuple[str, ...]] = (
        "share-quantizers",
        "sequence-first",
        "fold-adapters",
        "fold-reparam",
        "precompute-bos",
    )

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        if not context.target.merge_projections:
            return
        for x in _shared(model, context):
            groups: dict[tuple[object, ...], list[_Linear]] = defaultdict(list)
            for use in x.uses():
                linear, reason = _linear(use.node, context)
                if linear is not None:
                    groups[_key(linear)].append(linear)
                elif reason:
                    report.skipped.append(WhyNot(use.node.name or "", reason))
            for group in (part for same in groups.values() for part in _nameable(same)):
                if len(group) > 1:
                    _merge(group)
                    report.touched.extend(module_of(item.product) for item in group)
        if report.touched:
            remove_unused(model)


def _shared(model: ir.Model, context: PassContext) -> list[ir.Value]:
    """What quantizers write, and what layers of narrow weights alone read."""
    values: dict[ir.Value, None] = {}
    for node in model.graph:
        if is_fake_quantize(node):
            values[node.outputs[0]] = None
        elif node.op_type == "MatMul" and (plan := context.plan_of(module_of(node))) and plan.weight_only:
            values[input_of(node, 0)] = None
    return list(values)


def _key(linear: _Linear) -> tuple[object, ...]:
    """Layers of one storage and type, so that no code and no rounding changes; their blocks may differ (the text's)."""
    return linear.dtype, linear.block, dtype_of(linear.last.outputs[0]), sequence_first(linear.product)


def _nameable(group: Sequence[_Linear]) -> list[list[_Linear]]:
    """Parts of a group whose joint names TensorRT takes (the text of SDXL is read by 140 layers)."""
    parts: list[list[_Linear]] = [[]]
    for item in group:
        if len(merged_name(module_of(one.product) for one in [*parts[-1], item])) > _LONGEST_NAME:
            parts.append([])
        parts[-1].append(item)
    return parts


def _linear(node: ir.Node, context: PassContext) -> tuple[_Linear | None, str]:
    """A layer that can be merged, or why it cannot (empty for what is no linear layer)."""
    if node.op_type != "MatMul" or is_fake_quantize(input_of(node, 1).producer()):
        return None, ""
    weight = weight_source(node)
    plan = context.plan_of(module_of(node))
    if weight is None or plan is None:
        return None, ""
    if plan.bos:
        return None, "the first token of the text has a constant output in this layer"
    if scaled_for(node):
        return None, "its output carries the channel scale of another layer"
    codes, dtype = const_or_none(input_of(weight, 0)), input_of(weight, 0).dtype
    if codes is None or dtype is None or codes.ndim != 2 or _is_transposed(node, weight):
        return None, "its weight is not a matrix of codes, input features first"
    block, scale = int_attr(weight, "block_size", 0), const_of(weight, 1)
    if plan.weight_only and (not block or dtype == ir.DataType.INT4):
        return None, "its weight alone is quantized, and the builder keeps it narrow as it is"
    if not block and scale.size > 1 and int_attr(weight, "axis", 1) % 2 != 1:
        return None, "its scales do not lie along the output features"
    bias, last = _bias(node)
    return _Linear(node, last, bias, codes, scale if block else scale.reshape(-1), dtype, block), ""


def _is_transposed(node: ir.Node, weight: ir.Node) -> bool:
    producer = input_of(node, 1).producer()
    while producer is not None and producer is not weight:
        if producer.op_type == "Transpose":
            return True
        producer = input_of(producer, 0).producer()
    return False


def _bias(node: ir.Node) -> tuple[np.ndarray | None, ir.Node]:
    follower = only_consumer(node.outputs[0])
    if follower is None or follower.op_type != "Add" or module_of(follower) != module_of(node):
        return None, node
    bias = const_or_none(follower.inputs[1 if follower.inputs[0] is node.outputs[0] else 0])
    return (None, node) if bias is None or bias.ndim != 1 else (bias, follower)


def _merge(group: Sequence[_Linear]) -> None:
    """Writes the product of all in front of the first, and lets its parts take the places of the layers' outputs."""
    order = {node: index for index, node in enumerate(graph_of(group[0].product))}
    first = min((item.product for item in group), key=order.__getitem__)
    module = merged_name(module_of(item.product) for item in group)
    writer = NodeWriter(first, module)
    widths = [item.width for item in group]
    y = group[0].last.outputs[0]
    lead = list(shape_of(y))[:-1]
    product = writer.op(
        "MatMul",
        [input_of(first, 0), _weight(writer, group, dtype_of(input_of(first, 1)))],
        dtype=dtype_of(y),
        shape=[*lead, sum(widths)],
    )
    maker = product.producer()
    if maker is not None:  # what passes noted about the layers holds for the product
        maker.metadata_props.update({k: v for k, v in first.metadata_props.items() if k != LAYER_KEY})
    if any(item.bias is not None for item in group):
        parts = [np.zeros(item.width) if item.bias is None else item.bias for item in group]
        bias = np.concatenate(parts).astype(dtype_of(y).numpy())
        product = writer.op("Add", [product, writer.constant("bias", bias)], like=product)
    sizes = writer.constant("widths", np.array(widths, np.int64))
    outputs = writer.many("Split", [product, sizes], {"axis": -1}, [[*lead, width] for width in widths])
    for item, part in zip(group, outputs, strict=True):
        replace_value(item.last.outputs[0], part)


def _weight(writer: NodeWriter, group: Sequence[_Linear], body: ir.DataType) -> ir.Value:
    """The codes side by side; one scale when all layers have the same one, else one per output feature, or block."""
    codes, block = np.concatenate([item.codes for item in group], axis=1), group[0].block
    scale, attributes = (_block_scales(group), {"axis": 0, "block_size": block}) if block else _scales(group)
    operands = [
        writer.constant("codes", codes),
        writer.constant("scale", scale),
        writer.constant("zero", np.zeros(scale.shape, codes.dtype)),
    ]
    dtype = ir.DataType.from_numpy(scale.dtype)
    restored = writer.op("DequantizeLinear", operands, attributes, dtype=dtype, shape=codes.shape)
    return writer.cast(restored, body)


def _block_scales(group: Sequence[_Linear]) -> np.ndarray:
    return np.concatenate([item.scale for item in group], axis=1)


def _scales(group: Sequence[_Linear]) -> tuple[np.ndarray, dict[str, int]]:
    scale = np.concatenate([np.broadcast_to(item.scale, (item.width,)) for item in group]).astype(np.float32)
    if all(item.scale.size == 1 for item in group) and (scale == scale[0]).all():
        return scale[0], {}
    return scale, {"axis": 1}
