"""Cuts a lowered network into blocks that can be built alone, and gives equal blocks equal digests."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from qdexport.core.forms import Signature
from qdexport.graph.dialect import FORM_KEY
from qdexport.graph.evaluate import subgraph
from qdexport.graph.forms import form_site
from qdexport.graph.query import COMPUTE_OPS, const_or_none, module_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Block", "Site", "block_digest", "cut_blocks"]

# module lists whose members are blocks, as diffusers names them; the outermost one in a path counts, so that a
# transformer between its projections stays whole
_BLOCK = re.compile(
    r"(?:^|.*?\.)(?:resnets|attentions|motion_modules|downsamplers|upsamplers"
    r"|transformer_blocks|single_transformer_blocks|joint_transformer_blocks)\.\d+(?=\.|$)"
)
_BY_ELEMENT = frozenset(
    {"Add", "Cast", "Clip", "Div", "Erf", "Mul", "Reshape", "Resize", "Round", "Sigmoid", "Sub", "Tanh", "Transpose"}
)
_EXACT_CONSTANTS = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})  # sizes, axes, permutations


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An operator of several forms: its kind and signature."""

    operator: str
    signature: Signature

    @property
    def key(self) -> str:
        """A text that equal sites share."""
        return json.dumps([self.operator, self.signature], sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part of the network as a model of its own.

    Attributes:
        name: module path that its operators have in common.
        model: weights are shared with the network; inputs and outputs have the network's names.
        sites: its operators of several forms, each signature once, in the order of the graph.
        digest: of structure, shapes and types; the values of weights do not count.
    """

    name: str
    model: ir.Model = field(repr=False)
    sites: tuple[Site, ...]
    digest: str


def cut_blocks(model: ir.Model) -> list[Block]:
    """The blocks of a lowered network that have operators of several forms, in the order of the graph.

    A block is what belongs to one entry of a module list (a resnet, a transformer between its projections). It is
    widened by what a builder fuses across its ends: at an input back to the convolutions and products that make it,
    with their quantizers; at an output on to the quantizers that read it alone. What an operator costs depends on
    these neighbours.

    Args:
        model: lowered and typed; its marked nodes name their operators and signatures.
    """
    cutter = _Cutter(model)
    by_name: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        name = _block_of(module_of(node))
        if name:
            by_name.setdefault(name, []).append(node)
    return [block for name, nodes in by_name.items() if (block := cutter.block(name, nodes)) is not None]


def block_digest(model: ir.Model) -> str:
    """A SHA-256 over operators, attributes, wiring, types and shapes, in the order of the graph.

    Constants count by type and shape; whole numbers (sizes, axes) by value too, and single numbers by which of them
    are equal, since equal scales are merged and different ones are not.
    """
    numbers: dict[int, int] = {}
    equal: dict[bytes, int] = {}
    text = [_described(value, equal, numbers) for value in model.graph.inputs]
    for node in model.graph:
        operands = [_described(value, equal, numbers) for value in node.inputs]
        attributes = {name: _attribute(item) for name, item in sorted(node.attributes.items())}
        text.append([node.domain, node.op_type, attributes, node.metadata_props.get(FORM_KEY, ""), operands])
        text.extend(_described(value, equal, numbers) for value in node.outputs)
    text.append([numbers[id(value)] for value in model.graph.outputs])
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()


def _block_of(module: str) -> str:
    match = _BLOCK.match(module)
    return module[: match.end()] if match else module.partition(".")[0]


def _site(node: ir.Node) -> Site | None:
    found = form_site(node)
    return None if found is None else Site(operator=found[0], signature=found[1])


class _Cutter:
    """Cuts blocks out of one network."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        # initializers, and what is made of constants alone (a dequantized weight)
        self._frozen: set[ir.Value] = set(model.graph.initializers.values())
        for node in model.graph:
            if all(value is None or value in self._frozen for value in node.inputs):
                self._frozen.update(node.outputs)

    def block(self, name: str, own: Sequence[ir.Node]) -> Block | None:
        """A block of these nodes and what is fused with them; None when none of them has several forms."""
        found = {site.key: site for node in own if (site := _site(node)) is not None}
        if not found:
            return None
        nodes = set(own) | self._before(own)
        nodes |= self._behind(nodes)
        ordered = [node for node in self._model.graph if node in nodes]
        inside = {value for node in ordered for value in node.outputs}
        inputs = {value: None for node in ordered for value in self._moving(node) if value not in inside}
        outputs = [
            value
            for node in ordered
            for value in node.outputs
            if value not in self._frozen
            and (value.is_graph_output() or any(use.node not in nodes for use in value.uses()))
        ]
        part = subgraph(self._model, list(inputs), outputs)
        return Block(name=name, model=part, sites=tuple(found.values()), digest=block_digest(part))

    def _moving(self, node: ir.Node) -> list[ir.Value]:
        return [value for value in node.inputs if value is not None and value not in self._frozen]

    def _before(self, own: Sequence[ir.Node]) -> set[ir.Node]:
        """What makes the inputs of a block, back to the quantizers of the convolutions and products behind them."""
        made = {value for node in own for value in node.outputs}
        found: set[ir.Node] = set()
        for value in [value for node in own for value in self._moving(node) if value not in made]:
            found |= self._made_by(value, residuals=1) or set()
        return found

    def _made_by(self, value: ir.Value, residuals: int) -> set[ir.Node] | None:
        """The nodes from the nearest convolutions or products to a tensor; None where there are none in reach.

        A sum of two tensors is followed ``residuals`` times: the other summand of a residual connection goes back to
        the beginning of the network.
        """
        node = value.producer()
        if node is None:
            return None
        if node.op_type in COMPUTE_OPS:
            return {node} | _quantizer(node.inputs[0])
        operands = self._moving(node)
        residual = len(operands) > 1 and node.op_type != "Concat"
        if node.op_type not in _BY_ELEMENT | {"Concat"} or (residual and residuals == 0):
            return None
        parts = [self._made_by(item, residuals - 1 if residual else residuals) for item in operands]
        reached = [part for part in parts if part is not None]
        return {node}.union(*reached) if reached else None

    def _behind(self, nodes: set[ir.Node]) -> set[ir.Node]:
        """Elementwise readers of nothing but a block's outputs, as far as they lead to a quantizer."""
        known = {value for node in nodes for value in node.outputs if value not in self._frozen}
        grown: list[ir.Node] = []
        for node in self._model.graph:
            moving = self._moving(node)
            if node in nodes or not moving or any(value not in known for value in moving):
                continue
            if node.op_type in _BY_ELEMENT:
                known.update(node.outputs)
            elif node.op_type != "QuantizeLinear":
                continue
            grown.append(node)
        kept: set[ir.Node] = set()
        for node in reversed(grown):
            if node.op_type == "QuantizeLinear" or any(use.node in kept for use in node.outputs[0].uses()):
                kept.add(node)
        return kept


def _quantizer(value: ir.Value | None) -> set[ir.Node]:
    """Casts, Clip, QuantizeLinear and DequantizeLinear in front of a convolution's input."""
    found: set[ir.Node] = set()
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in {"Cast", "Clip", "DequantizeLinear", "QuantizeLinear"}:
            break
        found.add(node)
        value = node.inputs[0]
    return found


def _described(value: ir.Value | None, equal: dict[bytes, int], numbers: dict[int, int]) -> Any:
    if value is None:
        return None
    if id(value) in numbers:
        return numbers[id(value)]
    numbers[id(value)] = len(numbers)
    shape = None if value.shape is None else [str(dim) for dim in value.shape]
    described: list[Any] = [numbers[id(value)], str(value.dtype), shape]
    if value.producer() is None and (array := const_or_none(value)) is not None:
        if value.dtype in _EXACT_CONSTANTS:
            described.append(array.tolist())
        elif array.size == 1:
            described.append(equal.setdefault(np.asarray(array).tobytes(), len(equal)))
    return described


def _attribute(attribute: ir.Attr) -> str:
    value = attribute.value
    return f"{value.dtype} {value.shape}" if isinstance(value, ir.TensorProtocol) else str(value)
