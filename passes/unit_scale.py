"""The unit-scale form: an affine map outside a quantizer of scale 1, which every target computes with integers.

With ``q = clip(rint(x / s) + z, qmin, qmax)`` and a constant offset ``o`` that brings ``q - o`` into INT8::

    y = conv(w k, (q - z) s) + b = (conv(k, q - o) + (o - z) * sum(k)) * s w + b

for weight codes ``k`` with scales ``w``. ``o = z`` when ``q - z`` fits (then the second term vanishes, zero padding
stays zero, and ``w`` may stay in the weight), else ``o = 128`` for unsigned
8-bit codes: zero padding is then made explicit before the quantizer, so that every product sees the code of 0.
``s`` and ``z`` may be constants or rows of a table. The rounding is written out, so that the codes are exactly those of
the fake-quant layer (a shift before the rounding would move ties). The two terms with ``o`` are many times larger than
their sum; as whole numbers below 2^24 they are exact in FP32, so nothing is lost where they cancel. Everything outside
is FP32, one Cast after.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qdexport.errors import GraphPassError
from qdexport.graph.edit import NodeWriter, replace_value
from qdexport.graph.query import (
    COMPUTE_OPS,
    code_format,
    const_of,
    const_or_none,
    dtype_of,
    graph_of,
    input_of,
    int_attr,
    ints_attr,
    module_of,
    only_consumer,
    shape_of,
)
from qdexport.passes.float32_product import codes_alone, dequantized_weight

__all__ = ["UnitScale", "rewrite_unit_scale"]

_INT8_MIN, _INT8_MAX = -128, 127
_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitScale:
    """Parameters of one quantizer as graph values that broadcast against its input.

    Attributes:
        scale: FP32.
        zero_point: FP32 integer valued, or None when it is 0 in every row.
        offset_is_zero_point: whether ``o = z``; else ``o`` is ``offset``.
        offset: the constant offset ``o``.
        correction: FP32 integer valued ``o - z``; None when ``o = z``.
    """

    scale: ir.Value
    zero_point: ir.Value | None
    offset_is_zero_point: bool
    offset: int
    correction: ir.Value | None


def rewrite_unit_scale(node: ir.Node, parameters: UnitScale) -> None:
    """Rewrites one activation quantizer and all convolutions and products that read it.

    Raises:
        GraphPassError: something else reads the quantized tensor, so that the scale cannot move behind it, or a layer
            has a weight or attributes of another form.
    """
    consumers = [use.node for use in node.outputs[0].uses()]
    foreign = [item.name for item in consumers if item.op_type not in COMPUTE_OPS]
    if foreign or node.outputs[0].is_graph_output():
        raise GraphPassError(
            f"{module_of(node)}: {', '.join(map(str, foreign)) or 'a graph output'} reads the quantized tensor itself; "
            "only convolutions and linear layers may, when its scale depends on the step or its zero point does not fit"
        )
    by_padding: dict[tuple[int, ...], list[ir.Node]] = {}
    for item in consumers:
        _check_form(item)
        pads = ints_attr(item, "pads") if item.op_type == "Conv" and parameters.correction is not None else ()
        by_padding.setdefault(pads if any(pads) else (), []).append(item)
    for pads, group in by_padding.items():
        unit = _quantize_input(node, parameters, pads)
        for item in group:
            body = dtype_of(item.outputs[0])
            _compute_in_float32(item, unit, padded=bool(pads))
            _write_epilogue(item, parameters, body)


def _quantize_input(node: ir.Node, parameters: UnitScale, pads: tuple[int, ...]) -> ir.Value:
    writer = NodeWriter(node)
    x = input_of(node, 0)
    qmin, qmax = int_attr(node, "qmin"), int_attr(node, "qmax")
    if pads:
        x = _pad(writer, x, pads)
    x = writer.cast(x, _FLOAT)
    unit = writer.op("Div", [x, parameters.scale], like=x)
    if parameters.zero_point is not None:
        unit = writer.op("Round", [unit], like=unit)
        unit = writer.op("Add", [unit, parameters.zero_point], like=unit)
        if parameters.offset_is_zero_point:
            low, high = (writer.constant(f"q{end}", np.float32(q)) for end, q in (("min", qmin), ("max", qmax)))
            unit = writer.op("Clip", [unit, low, high], like=unit)
            unit = writer.op("Sub", [unit, parameters.zero_point], like=unit)
            qmin, qmax = _INT8_MIN, _INT8_MAX
        else:
            unit = writer.op("Sub", [unit, writer.constant("offset", np.float32(parameters.offset))], like=unit)
            qmin, qmax = qmin - parameters.offset, qmax - parameters.offset
    one = writer.constant("unit_scale", np.ones(1, np.float32))
    zero = writer.constant("unit_zero_point", np.zeros(1, np.float32))
    return writer.fake_quantize(unit, one, zero, qmin, qmax, code_format(node))


def _pad(writer: NodeWriter, x: ir.Value, pads: tuple[int, ...]) -> ir.Value:
    half = len(pads) // 2
    widths = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
    shape = list(shape_of(x))
    for axis in range(half):
        size = shape[2 + axis]
        shape[2 + axis] = size + pads[axis] + pads[half + axis] if isinstance(size, int) else ir.SymbolicDim(None)
    return writer.op("Pad", [x, writer.constant("pads", widths)], dtype=dtype_of(x), shape=ir.Shape(shape))


def _compute_in_float32(node: ir.Node, unit: ir.Value, *, padded: bool) -> None:
    node.replace_input_with(1, dequantized_weight(node).outputs[0])
    node.replace_input_with(0, unit)
    node.outputs[0].type = ir.TensorType(_FLOAT)
    if padded:
        node.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(ints_attr(node, "pads")))


def _check_form(node: ir.Node) -> None:
    """Refuses attributes with which ``s`` and the bias could not leave the layer as they do."""
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "auto_pad": "NOTSET"}
    for name, value in plain.items():
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value != value:
            raise GraphPassError(
                f"{module_of(node)}: {node.op_type} with {name}={attribute.value!r} cannot take a scale that depends "
                f"on the step or a zero point that does not fit; only {name}={value!r} can"
            )


def _write_epilogue(node: ir.Node, parameters: UnitScale, body: ir.DataType) -> None:
    """``(y + (o - z) sum(k)) s w + b`` in FP32, then one Cast; takes over the bias of the layer."""
    product = node.outputs[0]
    bias, last = _take_bias(node)
    old = last.outputs[0]
    writer = NodeWriter(last, module_of(node), after=True)
    shape = (1, -1, 1, 1) if node.op_type == "Conv" else (-1,)
    if parameters.correction is None:
        y = first = writer.op("Mul", [product, parameters.scale], dtype=_FLOAT, shape=product.shape)
    else:
        weight_scale, sums = codes_alone(node)
        shift = _times(writer, "weight_sums", sums.reshape(shape), parameters.correction)
        factor = _times(writer, "weight_scale", weight_scale.reshape(shape), parameters.scale)
        first = writer.op("Add", [product, shift], dtype=_FLOAT, shape=product.shape)
        y = writer.op("Mul", [first, factor], dtype=_FLOAT, shape=product.shape)
    if bias is not None:
        addend = writer.constant("bias", bias.astype(np.float32).reshape(shape))
        y = writer.op("Add", [y, addend], dtype=_FLOAT, shape=product.shape)
    y = writer.cast(y, body)
    reader = first.producer()
    replace_value(old, y, keep=[] if reader is None else [reader])
    if last is not node:
        graph_of(last).remove(last, safe=True)


def _times(writer: NodeWriter, label: str, per_channel: np.ndarray, factor: ir.Value) -> ir.Value:
    """The product of float64 numbers per channel and a graph value: a constant, rounded once, where that is one."""
    fixed = const_or_none(factor)
    if fixed is not None:
        return writer.constant(label, (per_channel * fixed.astype(np.float64)).astype(np.float32))
    constant = writer.constant(label, per_channel.astype(np.float32))
    return writer.op("Mul", [constant, factor], dtype=_FLOAT, shape=_joined(constant, factor))


def _take_bias(node: ir.Node) -> tuple[np.ndarray | None, ir.Node]:
    """The layer's bias, and the node that ends the layer; a bias inside the node is removed from it."""
    module = module_of(node)
    if node.op_type in {"Conv", "Gemm"}:
        if len(node.inputs) < 3 or node.inputs[2] is None:
            return None, node
        bias = const_of(node, 2)
        node.resize_inputs(2)
        return bias, node
    follower = only_consumer(node.outputs[0])
    if follower is not None and follower.op_type == "Add" and module_of(follower) == module:
        other = 1 if follower.inputs[0] is node.outputs[0] else 0
        return const_of(follower, other), follower
    return None, node


def _joined(a: ir.Value, b: ir.Value) -> ir.Shape:
    left, right = list(shape_of(a)), list(shape_of(b))
    rank = max(len(left), len(right))
    left = [*(1 for _ in range(rank - len(left))), *left]
    right = [*(1 for _ in range(rank - len(right))), *right]
    return ir.Shape([r if one == 1 else one for one, r in zip(left, right, strict=True)])
