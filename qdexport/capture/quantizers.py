"""Takes quantizers off a denoiser before it is traced, and puts them into the graph afterwards.

PyTorch traces every operator and every parameter several times in Python. A quantized layer brings two operators and
four parameters along, none of which the trace needs: where they belong is known from the layer's name. Without them a
trace takes half the time. Layers of other classes, and layers that hooks watch, keep theirs and are traced with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
from torch import nn

from qdexport.graph.dialect import DOMAIN, FAKE_QUANTIZE, LAYER_KEY, NO_AXIS, VERSION
from qdexport.graph.edit import add_constant, name_everything, remove_unused
from qdexport.graph.query import COMPUTE_OPS, const_or_none, graph_of, input_of, int_attr, ints_attr, module_of
from qdexport.quant.attach import shared_copy
from qdexport.quant.modules import ActivationQuantizer, QuantConv2d, QuantLinear, WeightQuantizer

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["QuantLayer", "put_back", "take_off"]

QuantLayer = QuantConv2d | QuantLinear


@dataclass(frozen=True, slots=True)
class _Site:
    """Where the quantizers of a layer go: its operator, its name, and the axis of the weight's output channels."""

    node: ir.Node
    name: str
    layer: QuantLayer
    axis: int


def take_off(denoiser: nn.Module) -> tuple[nn.Module, dict[str, QuantLayer]]:
    """A copy of the module tree over the same tensors, in which quantized layers are plain ones.

    Returns:
        The copy (``denoiser`` itself when there is nothing to take off), and the quantized layers by path.
    """
    layers = {name: item for name, item in denoiser.named_modules() if _is_plain_inside(item)}
    if not layers:
        return denoiser, {}
    plain = shared_copy(denoiser)
    for name in layers:
        parent, _, attribute = name.rpartition(".")
        setattr(plain.get_submodule(parent), attribute, _plain(plain.get_submodule(name)))
    return plain, {name: item for name, item in layers.items() if isinstance(item, QuantLayer)}


def put_back(model: ir.Model, layers: Mapping[str, QuantLayer], row: ir.Value | None) -> list[str]:
    """Writes the quantizers of the layers in front of their operators.

    Args:
        model: captured without them; nodes carry module paths.
        layers: by path.
        row: the table row of the timestep, for scales that have several.

    Returns:
        Paths of layers whose operator is not there, or not like one; the graph is then as it was.
    """
    found: dict[str, list[_Site | None]] = {name: [] for name in layers}
    for node in model.graph:
        name = module_of(node)
        if node.op_type in COMPUTE_OPS and name in layers:
            found[name].append(_site(node, name, layers[name], row))
    missing = [name for name, sites in found.items() if not sites or None in sites]
    if missing or not layers:
        return missing
    model.graph.opset_imports[DOMAIN] = VERSION
    shared: dict[tuple[int, int], ir.Value] = {}
    for site in [site for sites in found.values() for site in sites if site is not None]:
        _quantize_input(site, row, shared)
        _quantize_weight(site)
    model.graph.sort()
    remove_unused(model)
    name_everything(model)
    return []


def _is_plain_inside(module: nn.Module) -> bool:
    """Whether a module is a layer with the quantizers and the forward that this package knows."""
    if type(module) not in (QuantConv2d, QuantLinear) or "forward" in module.__dict__:
        return False
    parts = dict(module.named_children())
    kinds = {"input_quantizer": ActivationQuantizer, "weight_quantizer": WeightQuantizer}
    watched = any(item._forward_hooks or item._forward_pre_hooks for item in module.modules())
    return {name: type(part) for name, part in parts.items()} == kinds and not watched


def _plain(layer: nn.Module) -> nn.Module:
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    plain: nn.Module = kind.__new__(kind)
    plain.__dict__ = {**layer.__dict__, "_modules": {}}
    return plain


def _site(node: ir.Node, name: str, layer: QuantLayer, row: ir.Value | None) -> _Site | None:
    """The place of a layer's quantizers; None when the operator does not read a constant of the weight's shape."""
    if layer.input_quantizer.scale.shape[0] > 1 and row is None:
        return None
    shape = tuple(layer.weight.shape)
    if node.op_type == "Conv":
        axis = 0
    elif node.op_type == "Gemm":
        axis = 0 if int_attr(node, "transB", 0) else 1
    else:
        axis = 1
    if const_or_none(_stored_weight(node)) is None:
        return None
    if _transpose(node) is not None:
        axis = 1 - axis
    stored = _stored_weight(node).shape
    expected = shape if axis == 0 else shape[::-1]
    return _Site(node, name, layer, axis) if stored is not None and tuple(stored) == expected else None


def _transpose(node: ir.Node) -> ir.Node | None:
    """The node that swaps the axes of a matrix between its initializer and the operator."""
    producer = input_of(node, 1).producer()
    swaps = producer is not None and producer.op_type == "Transpose" and ints_attr(producer, "perm", (1, 0)) == (1, 0)
    return producer if swaps else None


def _stored_weight(node: ir.Node) -> ir.Value:
    transpose = _transpose(node)
    return input_of(node, 1) if transpose is None else input_of(transpose, 0)


def _quantize_input(site: _Site, row: ir.Value | None, shared: dict[tuple[int, int], ir.Value]) -> None:
    quantizer, x = site.layer.input_quantizer, input_of(site.node, 0)
    key = (id(quantizer), id(x))
    if key not in shared:
        used_row = row if quantizer.scale.shape[0] > 1 else None
        shared[key] = _write(site, "input_quantizer", x, NO_AXIS, used_row)
    site.node.replace_input_with(0, shared[key])


def _quantize_weight(site: _Site) -> None:
    axis = site.axis if site.layer.weight_quantizer.scale.dim() == 2 else NO_AXIS
    quantized = _write(site, "weight_quantizer", _stored_weight(site.node), axis, None)
    transpose = _transpose(site.node)
    if transpose is None:
        site.node.replace_input_with(1, quantized)
        return
    # a node of its own: equal weights of two layers share one, and may be quantized differently
    swapped = ir.node("Transpose", [quantized], {"perm": [1, 0]}, name=f"{site.name}/Transpose")
    swapped.metadata_props[LAYER_KEY] = site.name
    old = transpose.outputs[0]
    swapped.outputs[0].type, swapped.outputs[0].shape = old.type, old.shape
    graph_of(site.node).insert_before(site.node, swapped)
    site.node.replace_input_with(1, swapped.outputs[0])


def _write(site: _Site, part: str, x: ir.Value, axis: int, row: ir.Value | None) -> ir.Value:
    """A FakeQuantize before the layer's operator, in the name of the quantizer."""
    quantizer = site.layer.get_submodule(part)
    if not isinstance(quantizer, ActivationQuantizer | WeightQuantizer):
        raise TypeError(f"{site.name}.{part} is a {type(quantizer).__name__}")
    graph, module = graph_of(site.node), f"{site.name}.{part}"
    parameters = [
        add_constant(graph, f"{module}.{name}", getattr(quantizer, name).numpy()) for name in ("scale", "zero_point")
    ]
    inputs = [x, *parameters] if row is None else [x, *parameters, row]
    attributes = {"qmin": quantizer.spec.qmin, "qmax": quantizer.spec.qmax, "axis": axis}
    node = ir.node(FAKE_QUANTIZE, inputs, attributes, domain=DOMAIN, name=f"{module}/{FAKE_QUANTIZE}")
    node.metadata_props[LAYER_KEY] = module
    node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    graph.insert_before(site.node, node)
    return node.outputs[0]
