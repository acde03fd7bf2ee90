"""Cuts quantized layers out of an emitted graph, so that each can be fed and read on its own.

A probe is a model with a fresh input ``L/x`` (what the quantizer of layer L reads) and two outputs per layer: the codes
``L/codes`` (none where the weight alone is quantized) and the layer's output ``L/y``, up to, not including, the next
quantizer. What depends on the timestep alone (rows of step tables) is kept and fed as in the whole graph; everything
else is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qdexport.core.layer_names import layers_of, node_names
from qdexport.errors import ParityError
from qdexport.graph.nvfp4 import DYNAMIC_QUANTIZE
from qdexport.graph.query import COMPUTE_OPS, const_or_none, input_of, int_attr, ints_attr, only_consumer, value_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

__all__ = ["LayerProbe", "Probe", "build_probe", "find_probes", "find_softmax_probes", "weight_codes"]

# what may stand between the integer codes of a weight and the layer
_PASSIVE = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_INPUT_QUANTIZER = re.compile(r".*\.input_quantizers?(\.\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A stretch of a graph that can be fed and read on its own.

    Attributes:
        name: torch path; ``path#i`` for a part of a split layer.
        x: the tensor that its quantizer reads.
        codes: what tells whether the quantizer decided alike; None when there is no quantizer.
        y: its output before the next quantizer.
    """

    name: str
    x: ir.Value
    codes: ir.Value | None
    y: ir.Value

    @property
    def x_name(self) -> str:
        """The probe's input."""
        return f"{self.name}/x"

    @property
    def codes_name(self) -> str:
        """The probe's first output, if it has codes."""
        return f"{self.name}/codes"

    @property
    def y_name(self) -> str:
        """The probe's last output."""
        return f"{self.name}/y"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProbe(Probe):
    """Where one quantized layer lies in a graph; ``codes`` is the output of its QuantizeLinear.

    Attributes:
        node: its convolution or product.
        pads: ONNX padding of ``x`` (all axes, begins and then ends) before the codes; empty without padding.
        weight: the integer initializer of its weight.
        weight_transposed: whether that is ``[K, N]``, torch's weight transposed.
        rows: the layer's output features, first and end, in a weight that holds those of several; None for its own.
    """

    node: ir.Node
    pads: tuple[int, ...]
    weight: ir.Value
    weight_transposed: bool
    rows: tuple[int, int] | None = None


def find_softmax_probes(model: ir.Model, names: Iterable[str]) -> dict[str, Probe]:
    """Finds the quantizers behind softmax by the module in their nodes' names; their values stand for their codes.

    Args:
        model: an emitted graph; nothing in it is changed.
        names: paths of the quantizers.

    Raises:
        ParityError: a quantizer has no nodes, or none that reads attention probabilities.
    """
    by_module: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        by_module.setdefault(_module(node), []).append(node)
    return {name: _softmax_probe(name, by_module.get(name, [])) for name in names}


def _softmax_probe(name: str, nodes: Sequence[ir.Node]) -> Probe:
    block = name.rpartition(".")[0]
    inside = set(nodes)
    reads = [value for node in nodes for value in node.inputs if value is not None]
    x = [v for v in reads if (maker := v.producer()) is not None and maker not in inside and _module(maker) == block]
    made = [value for node in nodes for value in node.outputs]
    y = [value for value in made if any(use.node not in inside for use in value.uses())]
    if len(set(x)) != 1 or len(y) != 1:
        raise ParityError(
            f"the ONNX file has no quantizer {name} between a softmax and one product, but one was planned; export "
            "the model again"
        )
    return Probe(name=name, x=x[0], codes=y[0], y=y[0])


def find_probes(
    model: ir.Model, names: Iterable[str], weight_only: Collection[str] = ()
) -> dict[str, LayerProbe]:
    """Finds quantized layers by the node names ``name/Conv``, ``name/MatMul`` and ``name/Gemm``.

    Args:
        model: an emitted graph; nothing in it is changed, weights are not read.
        names: layers, and parts ``name#i`` of split layers.
        weight_only: those of them whose input is not quantized.

    Raises:
        ParityError: a layer has no such node, or an operand of it is not quantized; the layer is named.
    """
    nodes = {name: node for node in model.graph if node.op_type in COMPUTE_OPS for name in node_names(node.name or "")}
    probes = {}
    for name in names:
        node = next((nodes[key] for op in sorted(COMPUTE_OPS) if (key := f"{name}/{op}") in nodes), None)
        if node is None:
            raise ParityError(
                f"the ONNX file has no node {name}/Conv, {name}/MatMul or {name}/Gemm, but layer {name} was "
                "planned as quantized; export the model again"
            )
        probes[name] = _probe(name, node, weight_only=name in weight_only)
    return probes


def weight_codes(probe: LayerProbe) -> np.ndarray:
    """The codes of a layer's weight, in torch's layout (output channels first); INT4 ones widened to INT8, of FP8 and
    FP4 the bits as INT8.
    """
    codes = const_or_none(probe.weight)
    if codes is None:
        raise ParityError(
            f"the weight codes of layer {probe.name}, {value_name(probe.weight)}, are not in the ONNX file"
        )
    if probe.weight.dtype == ir.DataType.INT4:
        codes = codes.astype(np.int8)
    elif probe.weight.dtype == ir.DataType.FLOAT8E4M3FN:
        codes = codes.view(np.int8)
    elif probe.weight.dtype == ir.DataType.FLOAT4E2M1:
        codes = (codes.view(np.int8) << 4) >> 4  # the sign fills the upper half, as in stored codes
    codes = codes.T if probe.weight_transposed else codes
    return codes if probe.rows is None else codes[slice(*probe.rows)]


def build_probe(model: ir.Model, probes: Sequence[Probe]) -> ir.Model:
    """A model of the given layers alone, each with an input and outputs of its own.

    Args:
        model: the graph that the probes were found in.
        probes: any subset of them.

    Returns:
        A new graph. Tensors are shared with ``model``, so external data stays where it is and is not read.

    Raises:
        ParityError: the type of a layer's input is not in the file.
    """
    cut = _Cut()
    outputs = [value for probe in probes for value in cut.layer(probe)]
    graph = ir.Graph(
        inputs=cut.inputs,
        outputs=outputs,
        nodes=cut.nodes,
        initializers=cut.initializers,
        opset_imports=dict(model.graph.opset_imports),
        name="probe",
    )
    return ir.Model(graph, ir_version=model.ir_version)


def _module(node: ir.Node) -> str:
    """The torch path in a node's name; emitted files carry no other."""
    return (node.name or "").rpartition("/")[0]


def _in_quantizer(node: ir.Node) -> bool:
    return _INPUT_QUANTIZER.fullmatch(_module(node)) is not None


def _probe(name: str, node: ir.Node, *, weight_only: bool) -> LayerProbe:
    x, codes, pads = (input_of(node, 0), None, ()) if weight_only else _walk_to_input(name, node)
    weight, transposed = _walk_to_weight(name, node)
    y, rows = _part_of(name, node, _walk_to_output(_module(node), node))
    return LayerProbe(
        name=name,
        node=node,
        x=x,
        codes=codes,
        y=y,
        pads=pads,
        weight=weight,
        weight_transposed=transposed,
        rows=rows,
    )


def _part_of(name: str, node: ir.Node, y: ir.Value) -> tuple[ir.Value, tuple[int, int] | None]:
    """The layer's own output and its features, where a product computes several layers."""
    layers = layers_of(_module(node))
    if len(layers) == 1:
        return y, None
    split = y.producer()
    widths = None if split is None or split.op_type != "Split" else const_or_none(split.inputs[1])
    if split is None or widths is None or len(widths) != len(layers):
        raise ParityError(
            f"layer {name} is computed by {node.name}, behind which the ONNX file has no Split with an output for each "
            "of its layers; export the model again"
        )
    index = layers.index(name)
    first = int(widths[:index].sum())
    return split.outputs[index], (first, first + int(widths[index]))


def _walk_to_input(name: str, node: ir.Node) -> tuple[ir.Value, ir.Value, tuple[int, ...]]:
    value = node.inputs[0]
    codes: ir.Value | None = None
    pads: tuple[int, ...] = ()
    while value is not None:
        producer = value.producer()
        # what is quantized in FP32 (sines of a class label) may be cast to the body's type in front of the product
        cast = producer is not None and producer.op_type == "Cast" and codes is None
        if producer is None or not (cast or _in_quantizer(producer)):
            break
        if producer.op_type in {"QuantizeLinear", DYNAMIC_QUANTIZE}:
            codes = producer.outputs[0]
        elif producer.op_type == "Pad":
            widths = const_or_none(producer.inputs[1])
            pads = () if widths is None else tuple(int(width) for width in widths)
        value = producer.inputs[0]
    if value is None or codes is None:
        raise ParityError(
            f"the input of layer {name} does not come from an input quantizer in the ONNX file, but the "
            "layer was planned as quantized; export the model again"
        )
    return value, codes, pads


def _walk_to_weight(name: str, node: ir.Node) -> tuple[ir.Value, bool]:
    transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not int_attr(node, "transB", 0))
    value, dequantized = node.inputs[1], False
    while value is not None and const_or_none(value) is None:
        producer = value.producer()
        if producer is None:
            break
        if producer.op_type == "DequantizeLinear" and not dequantized:
            dequantized = True
        elif producer.op_type == "Transpose" and ints_attr(producer, "perm", (1, 0)) == (1, 0):
            transposed = not transposed
        elif producer.op_type not in _PASSIVE:
            break
        value = producer.inputs[0]
    if value is None or not dequantized or const_or_none(value) is None:
        raise ParityError(
            f"the weight of layer {name} is not stored as integers in the ONNX file, but the layer was "
            "planned as quantized; export the model again"
        )
    return value, transposed


def _walk_to_output(module: str, node: ir.Node) -> ir.Value:
    value = node.outputs[0]
    while True:
        reader = only_consumer(value)
        if reader is None or _module(reader) != module:
            return value
        value = reader.outputs[0]


class _Cut:
    """Copies what layers need; what does not depend on a layer's input is copied once for all of them."""

    def __init__(self) -> None:
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self._shared: dict[ir.Value, ir.Value] = {}

    def layer(self, probe: Probe) -> tuple[ir.Value, ...]:
        """Copies one layer; returns its outputs."""
        if probe.x.dtype is None:
            raise ParityError(
                f"the type of {value_name(probe.x)}, the input of layer {probe.name}, is not in the ONNX file"
            )
        own = {probe.x: self._input(probe.x, probe.x_name)}
        y = self._copy(probe.y, own, probe.name)
        if probe.codes is None:
            y.name = probe.y_name
            return (y,)
        codes = self._copy(probe.codes, own, probe.name)
        if codes is y:  # one value under two names
            same = ir.node("Identity", [y], name=f"{probe.name}/codes")
            self.nodes.append(same)
            codes = same.outputs[0]
            codes.shape, codes.type = y.shape, y.type
        codes.name, y.name = probe.codes_name, probe.y_name
        return codes, y

    def _input(self, like: ir.Value, name: str | None) -> ir.Value:
        value = ir.Value(name=name, shape=like.shape, type=like.type)
        self.inputs.append(value)
        return value

    def _copy(self, value: ir.Value, own: dict[ir.Value, ir.Value], prefix: str) -> ir.Value:
        for scope in (own, self._shared):
            if value in scope:
                return scope[value]
        producer = value.producer()
        if producer is None:
            self._shared[value] = self._leaf(value)
            return self._shared[value]
        inputs = [None if item is None else self._copy(item, own, prefix) for item in producer.inputs]
        local = any(item in own for item in producer.inputs if item is not None)
        scope = own if local else self._shared
        label = f"{prefix}:" if local else ""
        outputs = [ir.Value(name=f"{label}{item.name}", shape=item.shape, type=item.type) for item in producer.outputs]
        self.nodes.append(
            ir.Node(
                producer.domain,
                producer.op_type,
                inputs,
                producer.attributes.values(),
                outputs=outputs,
                name=f"{label}{producer.name}",
            )
        )
        scope.update(zip(producer.outputs, outputs, strict=True))
        return scope[value]

    def _leaf(self, value: ir.Value) -> ir.Value:
        if value.const_value is None:
            return self._input(value, value.name)
        copy = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
        self.initializers.append(copy)
        return copy
