"""Moves the activation side ``1 / r`` of a channel scale into what makes the activation.

Before: ``norm(gamma, beta) -> Mul(1 / r) -> FakeQuantize -> op``
After:  ``norm(gamma / r, beta / r) -> FakeQuantize -> op``

Identity: a factor per channel commutes with data movement, with the gate of GEGLU and with ``P V``
(:mod:`qdexport.passes.channel_paths`), and ``(x gamma + beta) / r = x (gamma / r) + beta / r``; for a layer whose
weight is quantized per output channel ``codes (s / r)`` has the same codes. So it goes into the affine part of a
LayerNorm or GroupNorm, into ``to_v`` for ``to_out.0`` (also where the first token is projected apart), or into the
value half of ``ff.net.0.proj`` for ``ff.net.2``, when nothing else reads what is scaled. A norm that is modulated
(adaLN) takes it in too: ``(x^ (1 + s) + b) / r = (x^ / r) (1 + s) + b / r``, with ``1 / r`` in the norm's own weight
(where the norm has other readers, in the rows of ``1 + s``) and in the rows of ``b``: of the modulation's linear layer,
or of the table that it became. SiLU, GELU, residual sums and the text stand in the way: there ``1 / r`` stays in front
of the quantizer as its multiplier, which builders put into the quantizing kernel.

Exact algebra, but not exact numbers: new constants are products in float64, rounded once to their type, in place of a
product rounded at run time. A code may so differ where ``x / s`` is within a rounding of a tie. For powers of two
nothing is rounded, and every code is equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.query import (
    COMPUTE_OPS,
    const_or_none,
    is_fake_quantize,
    module_of,
    note_scaled_for,
    only_consumer,
    value_name,
)
from qdexport.graph.runner import WhyNot
from qdexport.passes.channel_makers import Absorbed, Edit, absorb
from qdexport.passes.channel_paths import Blocked, channel_scales_behind, is_channel_scale, possible_sources

if TYPE_CHECKING:
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["FoldReparam"]


@dataclass(frozen=True, slots=True)
class _Fold:
    """Products with ``1 / r`` that go away together."""

    scales: list[ir.Node]
    absorbed: Absorbed


class FoldReparam:
    """Removes products with ``1 / r`` where norms or layers take them in; says for each layer where they went."""

    name: ClassVar[str] = "fold-reparam"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = ("split-shortcut", "fold-adapters")

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        pending = [node for node in model.graph if is_channel_scale(node)]
        while pending:
            node = pending[0]
            fold = _plan(node)
            if isinstance(fold, Blocked):
                pending.remove(node)
                report.skipped.append(WhyNot(node.name or "", fold.reason))
                for layer in _layers(node):
                    report.notes[layer] = f"1 / r stays in front of the quantizer: {fold.reason}"
                continue
            _commit(fold, report)
            pending = [item for item in pending if item not in fold.scales]
        if report.touched:
            remove_unused(model)


def _plan(node: ir.Node) -> _Fold | Blocked:
    """Where one product could go; the reason of the nearest candidate when nowhere."""
    vector = _vector(node)
    value = next(item for item in node.inputs if item is not None and const_or_none(item) is None)
    why: Blocked | None = None
    for source in possible_sources(value):
        absorbed = absorb(source, vector)
        if isinstance(absorbed, Absorbed):
            scales = channel_scales_behind(source, absorbed.axis)
            if not isinstance(scales, Blocked):
                if all(np.array_equal(_vector(item), vector) for item in scales):
                    return _Fold(scales, absorbed)
                scales = Blocked(f"the layers that read {_maker(source)} have different channel scales")
            absorbed = scales
        why = why or absorbed
    return why or Blocked("no layer makes its input: it comes from an input of the network")


def _maker(value: ir.Value) -> str:
    """The node behind a tensor, by name."""
    node = value.producer()
    return value_name(value) if node is None or not node.name else node.name


def _vector(node: ir.Node) -> np.ndarray:
    """``1 / r``, float64 ``[C]``."""
    (constant,) = (array for value in node.inputs if (array := const_or_none(value)) is not None)
    return constant.reshape(-1).astype(np.float64)


def _layers(scale: ir.Node) -> list[str]:
    """The layers whose quantizers read a product with ``1 / r``."""
    pending, found = [scale], []
    while pending:
        for use in pending.pop().outputs[0].uses():
            if use.node.op_type in COMPUTE_OPS:
                found.append(module_of(use.node))
            elif is_fake_quantize(use.node) or use.node.op_type == "Cast":
                pending.append(use.node)
    return sorted(set(found)) or [module_of(scale).rpartition(".")[0]]


def _commit(fold: _Fold, report: PassReport) -> None:
    layers = sorted({layer for scale in fold.scales for layer in _layers(scale)})
    edits = fold.absorbed.edits
    for (node, index), array in _products(edits).items():
        node.replace_input_with(index, NodeWriter(node).constant("scaled", array))
    makers = sorted({module_of(edit.node).removesuffix(".weight_quantizer") for edit in edits})
    for node, first in _compute_nodes(edits):
        note_scaled_for(node, layers[0], first)
    for scale in fold.scales:
        data = next(item for item in scale.inputs if item is not None and const_or_none(item) is None)
        replace_value(scale.outputs[0], data)
    report.touched.extend(layers)
    for layer in layers:
        report.notes[layer] = f"1 / r folded into {', '.join(makers)}"


def _products(edits: tuple[Edit, ...]) -> dict[tuple[ir.Node, int], np.ndarray]:
    """The new constants, each rounded once to its type; several edits of one constant are one."""
    factors: dict[tuple[ir.Node, int], np.ndarray] = {}
    arrays = {(edit.node, edit.index): edit.array for edit in edits}
    for edit in edits:
        place = (edit.node, edit.index)
        factors[place] = factors[place] * edit.factor if place in factors else edit.factor
    return {
        place: np.asarray(array.astype(np.float64) * factors[place]).astype(array.dtype)
        for place, array in arrays.items()
    }


def _compute_nodes(edits: tuple[Edit, ...]) -> list[tuple[ir.Node, int]]:
    """The convolutions and products whose outputs are scaled, and from which channel on."""
    found = []
    for edit in edits:
        node: ir.Node | None = edit.node
        while node is not None and node.op_type in {"DequantizeLinear", "Cast", "Transpose"}:
            node = only_consumer(node.outputs[0])
        if node is not None and node.op_type in COMPUTE_OPS:
            found.append((node, edit.first))
    return list(dict.fromkeys(found))
