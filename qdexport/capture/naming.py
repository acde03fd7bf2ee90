"""Gives every node the path of the torch module it came from, as its name and in its metadata."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

import onnx_ir as ir

from qdexport.graph.dialect import LAYER_KEY
from qdexport.graph.edit import name_everything
from qdexport.graph.query import COMPUTE_OPS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["name_nodes"]

_SCOPES = "pkg.torch.onnx.name_scopes"
# torch names a layer that is reached through `self.resnets[1:]` by the slice: resnets.slice(1, None, None).0
_SLICE = re.compile(r"(?P<list>.*?)\.slice\((?P<bounds>[^)]*)\)\.(?P<index>\d+)(?P<rest>.*)")


def name_nodes(model: ir.Model, prefix: str, list_lengths: Mapping[str, int]) -> None:
    """Tags each node with its torch module path (relative to ``prefix``) and names it ``path/OpType``.

    Args:
        model: as the exporter made it.
        prefix: path of the denoiser inside the exported module.
        list_lengths: length of every ModuleList of the denoiser, by path.

    The exporter's metadata is dropped. A node that the exporter made itself takes the parent module of what it reads.
    The several convolutions of one split layer become ``path#0``, ``path#1``.
    """
    for node in model.graph:
        node.metadata_props[LAYER_KEY] = _module_path(node, prefix, list_lengths)
        for key in [key for key in node.metadata_props if key != LAYER_KEY]:
            del node.metadata_props[key]
    _number_split_layers(model)
    for node in model.graph:
        node.name = f"{node.metadata_props[LAYER_KEY]}/{node.op_type}"
    name_everything(model)


def _module_path(node: ir.Node, prefix: str, list_lengths: Mapping[str, int]) -> str:
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is None:
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None:
                return producer.metadata_props.get(LAYER_KEY, "").rpartition(".")[0]
        return ""
    # the list ends with the name of the operator's own result
    path = ast.literal_eval(scopes)[:-1]
    module = path[-1] if path else ""
    return _without_slices(str(module).removeprefix(prefix).removeprefix("."), list_lengths)


def _without_slices(path: str, list_lengths: Mapping[str, int]) -> str:
    while (match := _SLICE.fullmatch(path)) is not None:
        bounds = [None if part.strip() == "None" else int(part) for part in match["bounds"].split(",")]
        positions = range(list_lengths[match["list"]])[slice(*bounds)]
        path = f"{match['list']}.{positions[int(match['index'])]}{match['rest']}"
    return path


def _number_split_layers(model: ir.Model) -> None:
    by_layer: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type in COMPUTE_OPS:
            by_layer.setdefault(node.metadata_props[LAYER_KEY], []).append(node)
    for module, nodes in by_layer.items():
        if module and len(nodes) > 1 and all(_has_quantized_weight(node) for node in nodes):
            for index, node in enumerate(nodes):
                node.metadata_props[LAYER_KEY] = f"{module}#{index}"


def _has_quantized_weight(node: ir.Node) -> bool:
    value = node.inputs[1]
    producer = None if value is None else value.producer()
    return producer is not None and ".weight_quantizer" in producer.metadata_props.get(LAYER_KEY, "")
