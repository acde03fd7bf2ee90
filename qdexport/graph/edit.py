"""Edits of a graph: new nodes before an anchor, constants, replacement, and removal of what nobody reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qdexport.core.layer_names import layers_of
from qdexport.graph.dialect import CODE_FORMAT, DOMAIN, FAKE_QUANTIZE, LAYER_KEY
from qdexport.graph.query import dtype_of, graph_of, module_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    Dimension = int | ir.SymbolicDim

_LISTED = 3  # so many merged layers have their names in those of values

__all__ = ["NodeWriter", "add_constant", "name_everything", "remove_unused", "replace_value"]


def add_constant(graph: ir.Graph, name: str, value: ArrayLike) -> ir.Value:
    """Adds an initializer (a numpy array or scalar); a name in use gets a number."""
    name = _unused(graph, name)
    array = np.asarray(value, order="C")
    tensor = ir.tensor(array, name=name)
    kind = ir.TensorType(tensor.dtype)
    constant = ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
    graph.register_initializer(constant)
    return constant


def _unused(graph: ir.Graph, name: str) -> str:
    if name not in graph.initializers:
        return name
    counter = graph.meta.setdefault("qdexport.names", {})
    while True:
        counter[name] = counter.get(name, 0) + 1
        candidate = f"{name}_{counter[name]}"
        if candidate not in graph.initializers:
            return candidate


class NodeWriter:
    """Writes nodes in front of an anchor node, in the name of a torch module.

    Args:
        anchor: new nodes go directly before it (or after it, in order of writing).
        module: torch module path that the nodes are named and tagged with; default: the anchor's own.
        after: write behind the anchor instead.
    """

    def __init__(self, anchor: ir.Node, module: str | None = None, *, after: bool = False) -> None:
        self.graph = graph_of(anchor)
        self.module = module_of(anchor) if module is None else module
        self._anchor = anchor
        self._after = after

    def constant(self, label: str, value: ArrayLike) -> ir.Value:
        """An initializer named after the module."""
        return add_constant(self.graph, f"{self.module}/{label}", value)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | Sequence[Dimension] | None = None,
    ) -> ir.Value:
        """Adds a node with one output, whose type and shape are those of ``like`` unless given apart."""
        node = ir.node(op_type, list(inputs), attributes or {}, name=f"{self.module}/{op_type}")
        node.metadata_props[LAYER_KEY] = self.module
        self._place(node)
        out = node.outputs[0]
        _describe(out, dtype if dtype is not None or like is None else like.dtype)
        if shape is not None:
            out.shape = shape if isinstance(shape, ir.Shape) else ir.Shape(list(shape))
        elif like is not None:
            out.shape = like.shape
        return out

    def many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any],
        shapes: Sequence[Sequence[Dimension]],
    ) -> list[ir.Value]:
        """Adds a node with several outputs of the first input's type (Split)."""
        node = ir.node(op_type, list(inputs), attributes, num_outputs=len(shapes), name=f"{self.module}/{op_type}")
        node.metadata_props[LAYER_KEY] = self.module
        self._place(node)
        for out, shape in zip(node.outputs, shapes, strict=True):
            _describe(out, None if inputs[0] is None else inputs[0].dtype)
            out.shape = ir.Shape(list(shape))
        return list(node.outputs)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A Cast, or the value itself when it has the type already."""
        if dtype_of(value) == dtype:
            return value
        return self.op("Cast", [value], {"to": int(dtype)}, dtype=dtype, shape=value.shape)

    def fake_quantize(
        self, x: ir.Value, scale: ir.Value, zero_point: ir.Value, qmin: int, qmax: int, form: str = "int"
    ) -> ir.Value:
        """A per-tensor static FakeQuantize."""
        node = ir.node(
            FAKE_QUANTIZE,
            [x, scale, zero_point],
            {"qmin": qmin, "qmax": qmax, "axis": -1, **({} if form == "int" else {CODE_FORMAT: form})},
            domain=DOMAIN,
            name=f"{self.module}/{FAKE_QUANTIZE}",
        )
        node.metadata_props[LAYER_KEY] = self.module
        self._place(node)
        out = node.outputs[0]
        _describe(out, x.dtype)
        out.shape = x.shape
        return out

    def _place(self, node: ir.Node) -> None:
        if self._after:
            self.graph.insert_after(self._anchor, node)
            self._anchor = node
        else:
            self.graph.insert_before(self._anchor, node)


def _describe(value: ir.Value, dtype: ir.DataType | None) -> None:
    """A value without a name gets one at the end; one without a type stays without."""
    value.name = None
    if dtype is not None:
        value.dtype = dtype


def replace_value(old: ir.Value, new: ir.Value, *, keep: Sequence[ir.Node] = ()) -> None:
    """Lets all readers of ``old``, except the nodes in ``keep``, read ``new``; graph outputs keep their names."""
    for use in list(old.uses()):
        if use.node not in keep:
            use.node.replace_input_with(use.idx, new)
    graph = old.graph
    if graph is None or not old.is_graph_output():
        return
    if new.is_graph_output() or new.producer() is None:
        # an input, a constant or another output has a name of its own that must stay
        copy = ir.node("Identity", [new])
        copy.metadata_props[LAYER_KEY] = "" if (maker := old.producer()) is None else module_of(maker)
        graph.append(copy)
        copy.outputs[0].type, copy.outputs[0].shape = new.type, new.shape
        new = copy.outputs[0]
    new.name, old.name = old.name, None
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new


def remove_unused(model: ir.Model) -> bool:
    """Removes nodes and constants that nobody reads, and frees the constants.

    Nodes and values refer to each other, so Python by itself would keep a large constant until its next collection.
    """
    before = dict(model.graph.initializers)
    result = common_passes.RemoveUnusedNodesPass()(model)
    for name, value in before.items():
        if name not in model.graph.initializers:
            value.const_value = None
    return bool(result.modified)


def name_everything(model: ir.Model) -> None:
    """Numbers repeated node names in order, and names every unnamed value after its node."""
    nodes_taken: set[str] = set()
    values_taken = {value.name for node in model.graph for value in node.outputs if value.name}
    values_taken |= set(model.graph.initializers) | {value.name for value in model.graph.inputs if value.name}
    for node in model.graph:
        node.name = _free(node.name or node.op_type, "_", nodes_taken)
        nodes_taken.add(node.name)
        for index, value in enumerate(node.outputs):
            if not value.name:
                value.name = _free(f"{_short(node.name)}:{index}", ".", values_taken)
                values_taken.add(value.name)


def _short(name: str) -> str:
    """A node's name for its values: of merged layers the first and how many more, or the keys and values of all texts
    would have as many names of as many layers.
    """
    module, separator, kind = name.rpartition("/")
    layers = layers_of(module)
    return f"{layers[0]}+{len(layers) - 1}{separator}{kind}" if len(layers) > _LISTED else name


def _free(name: str, separator: str, taken: set[str]) -> str:
    candidate, number = name, 0
    while candidate in taken:
        number += 1
        candidate = f"{name}{separator}{number}"
    return candidate
