"""The unit-scale form: an affine map outside a quantizer of scale 1, which every target computes with integers.

With ``q = clip(rint(x / s) + z, qmin, qmax)`` and a constant offset ``o`` that brings ``q - o`` into INT8::

    y = conv(W, (q - z) s) + b = s * conv(W, q - o) + s (o - z) * sum(W) + b

``o = z`` when ``q - z`` fits (then the second term vanishes and zero padding stays zero), else ``o = 128`` for unsigned
8-bit codes: zero padding is then made explicit before the quantizer, so that every product sees the code of 0.
``s`` and ``z`` may be constants or rows of a table. The rounding is written out, so that the codes are exactly those of
the fake-quant layer (a shift before the rounding would move ties). Everything outside is FP32, one Cast after.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qdexport.errors import GraphPassError
from qdexport.graph.edit import NodeWriter, replace_value
from qdexport.graph.query import (
    COMPUTE_OPS,
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
    weight_source,
)

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
        correction: FP32 ``s (o - z)``; None when ``o = z``.
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
    return writer.fake_quantize(unit, one, zero, qmin, qmax)


def _pad(writer: NodeWriter, x: ir.Value, pads: tuple[int, ...]) -> ir.Value:
    half = len(pads) // 2
    widths = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
    shape = list(shape_of(x))
    for axis in range(half):
        size = shape[2 + axis]
        shape[2 + axis] = size + pads[axis] + pads[half + axis] if isinstance(size, int) else ir.SymbolicDim(None)
    return writer.op("Pad", [x, writer.constant("pads", widths)], dtype=dtype_of(x), shape=ir.Shape(shape))


def _compute_in_float32(node: ir.Node, unit: ir.Value, *, padded: bool) -> None:
    node.replace_input_with(1, _dequantized_weight(node).outputs[0])
    node.replace_input_with(0, unit)
    node.outputs[0].type = ir.TensorType(_FLOAT)
    if padded:
        node.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(ints_attr(node, "pads")))


def _dequantized_weight(node: ir.Node) -> ir.Node:
    """The DequantizeLinear that feeds a layer; nothing but a Cast may stand between, since it is passed over."""
    weight = weight_source(node)
    if weight is None or weight.op_type != "DequantizeLinear":
        raise GraphPassError(f"{module_of(node)}: the weight is not quantized although the input is")
    between = input_of(node, 1).producer()
    while between is not None and between is not weight:
        if between.op_type != "Cast":
            raise GraphPassError(
                f"{module_of(node)}: a {between.op_type} stands between the quantized weight and the layer; "
                "run fold-adapters first, and let no two layers share one weight"
            )
        between = input_of(between, 0).producer()
    return weight


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
    """``y s + (s (o - z) sum(W) + b)`` in FP32, then one Cast; takes over the bias of the layer."""
    product = node.outputs[0]
    bias, last = _take_bias(node)
    old = last.outputs[0]
    writer = NodeWriter(last, module_of(node), after=True)
    scaled = writer.op("Mul", [product, parameters.scale], dtype=_FLOAT, shape=product.shape)
    y = scaled
    addend = _addend(writer, node, parameters, bias)
    if addend is not None:
        y = writer.op("Add", [y, addend], dtype=_FLOAT, shape=product.shape)
    y = writer.cast(y, body)
    rescaling = scaled.producer()
    replace_value(old, y, keep=[] if rescaling is None else [rescaling])
    if last is not node:
        graph_of(last).remove(last, safe=True)


def _addend(writer: NodeWriter, node: ir.Node, parameters: UnitScale, bias: np.ndarray | None) -> ir.Value | None:
    """``s (o - z) sum(W) + b`` as a constant where it is one; None when there is neither."""
    shape = (1, -1, 1, 1) if node.op_type == "Conv" else (-1,)
    if parameters.correction is None:
        return None if bias is None else writer.constant("bias", bias.astype(np.float32).reshape(shape))
    sums = _weight_sums(node).reshape(shape)
    fixed = const_or_none(parameters.correction)
    if fixed is not None:
        total = sums * fixed.astype(np.float64) + (0.0 if bias is None else bias.astype(np.float64).reshape(shape))
        return writer.constant("bias", total.astype(np.float32))
    weight_sums = writer.constant("weight_sums", sums.astype(np.float32))
    joined = _joined(weight_sums, parameters.correction)
    term = writer.op("Mul", [weight_sums, parameters.correction], dtype=_FLOAT, shape=joined)
    if bias is None:
        return term
    constant = writer.constant("bias", bias.astype(np.float32).reshape(shape))
    return writer.op("Add", [term, constant], dtype=_FLOAT, shape=joined)


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


def _weight_sums(node: ir.Node) -> np.ndarray:
    """``sum(W)`` per output channel of the dequantized weight, in float64."""
    weight = _dequantized_weight(node)
    codes, scale = const_of(weight, 0).astype(np.float64), const_of(weight, 1).astype(np.float64)
    transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not int_attr(node, "transB", 0))
    axis = 1 if transposed else 0
    sums = codes.sum(axis=tuple(i for i in range(codes.ndim) if i != axis))
    return np.asarray(sums * scale.reshape(-1))


def _joined(a: ir.Value, b: ir.Value) -> ir.Shape:
    left, right = list(shape_of(a)), list(shape_of(b))
    rank = max(len(left), len(right))
    left = [*(1 for _ in range(rank - len(left))), *left]
    right = [*(1 for _ in range(rank - len(right))), *right]
    return ir.Shape([r if one == 1 else one for one, r in zip(left, right, strict=True)])
