"""Operators that can be written in several forms: their signatures, kept on the node so that later stages read them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from qdexport.graph.dialect import FORM_KEY
from qdexport.graph.query import const_or_none, input_of, is_fake_quantize, only_consumer

if TYPE_CHECKING:
    import onnx_ir as ir

    from qdexport.core.forms import Signature

__all__ = ["form_site", "mark_site", "what_follows"]

_AROUND = frozenset({"Cast", "Clip", "Reshape"})
_BY_CONSTANT = frozenset({"Add", "Mul"})


def mark_site(node: ir.Node, operator: str, signature: Signature) -> Signature:
    """Notes on a node which operator it stands for, unless it is noted already; returns the signature that counts.

    What follows an operator looks different once quantizers are lowered, so that the first signature is kept.
    """
    found = form_site(node)
    if found is not None and found[0] == operator:
        return found[1]
    node.metadata_props[FORM_KEY] = json.dumps([operator, signature])
    return signature


def form_site(node: ir.Node) -> tuple[str, Signature] | None:
    """The operator and signature that a node stands for; None for one that has a single form."""
    text = node.metadata_props.get(FORM_KEY)
    if text is None:
        return None
    operator, signature = json.loads(text)
    return operator, signature


def what_follows(value: ir.Value) -> str:
    """What reads a tensor: ``silu+quantize``, ``quantize``, ``silu``, or ``other``.

    Factors and summands that are constants, casts and reshapes do not count.
    """
    silu = ""
    while True:
        readers = [use.node for use in value.uses()]
        if readers and all(is_fake_quantize(item) or item.op_type == "QuantizeLinear" for item in readers):
            return f"{silu}+quantize" if silu else "quantize"
        product = _silu_of(readers)
        if product is not None and not silu:
            silu, value = "silu", product.outputs[0]
            continue
        reader = only_consumer(value)
        if reader is None or not _passes_through(reader):
            return silu or "other"
        value = reader.outputs[0]


def _silu_of(readers: list[ir.Node]) -> ir.Node | None:
    """The product of a tensor and its own sigmoid."""
    sigmoid = next((item for item in readers if item.op_type == "Sigmoid"), None)
    product = next((item for item in readers if item.op_type == "Mul"), None)
    if sigmoid is None or product is None or len(set(readers)) != 2:
        return None
    return product if sigmoid.outputs[0] in product.inputs else None


def _passes_through(node: ir.Node) -> bool:
    if node.op_type in _AROUND:
        return True
    return node.op_type in _BY_CONSTANT and any(
        const_or_none(input_of(node, index)) is not None for index in range(len(node.inputs))
    )
