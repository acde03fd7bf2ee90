"""Facts about any ONNX file, ours or not, without reading its weights."""

from __future__ import annotations

import collections
import os
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from qdexport.core.companion_facts import COMPANION_KEY, CompanionFacts
from qdexport.core.network_facts import METADATA_KEY, NetworkFacts
from qdexport.core.paths import below
from qdexport.core.reading import reading
from qdexport.errors import ModelError
from qdexport.graph.query import COMPUTE_OPS

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["load_onnx", "onnx_facts"]


def load_onnx(path: Path) -> ir.Model:
    """Reads an ONNX file; external weights stay on disk.

    Raises:
        ModelError: the file is absent, no ONNX file, or names data outside its folder.
    """
    if not path.exists():
        raise ModelError(f"{path} does not exist")
    if not path.is_file():
        raise ModelError(f"{path} is not an ONNX file: it is a folder, a pipe or a device")
    with reading(path, ModelError, what="is not an ONNX file, or is truncated"):
        model = ir.load(path)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            below(path.parent, os.fspath(value.const_value.location), path)
    if len(model.graph) == 0:
        raise ModelError(f"{path} is not an ONNX file, or is truncated: it holds no graph")
    return model


def onnx_facts(path: Path) -> dict[str, Any]:
    """Inputs, outputs, operators, stored bytes by type, and the weighted layers of an ONNX file.

    Raises:
        ModelError: the file is absent or no ONNX file.
    """
    model = load_onnx(path)
    with reading(path, ModelError, what="is an ONNX file that is not legal"):
        return _facts(path, model)


def _facts(path: Path, model: ir.Model) -> dict[str, Any]:
    stored: collections.Counter[str] = collections.Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            stored[str(value.const_value.dtype)] += value.const_value.nbytes
    facts: dict[str, Any] = {
        "kind": "ONNX file",
        "file_bytes": path.stat().st_size,
        "producer": f"{model.producer_name or 'unknown'} {model.producer_version or ''}".strip(),
        "opsets": {domain or "ai.onnx": version for domain, version in model.graph.opset_imports.items()},
        "inputs": {value.name or "": f"{value.dtype}{value.shape}" for value in model.graph.inputs},
        "outputs": {value.name or "": f"{value.dtype}{value.shape}" for value in model.graph.outputs},
        "nodes": len(model.graph),
        "operators": dict(collections.Counter(node.op_type for node in model.graph).most_common()),
        "weight_bytes": dict(stored),
        "layers": _layers(model),
    }
    if METADATA_KEY in model.metadata_props:
        ours = NetworkFacts.from_metadata(model.metadata_props, str(path))
        facts |= {"model": ours.model, "recipe": ours.recipe, "target": ours.target, "body": ours.body}
        facts["profiles"] = [
            {"profile": name, **{f"{key} (low, best, high)": str(ends) for key, ends in shapes.items()}}
            for name, shapes in ours.io.profile_shapes().items()
        ]
        facts["time_table"] = "in the network" if ours.time_table is None else f"{len(ours.time_table)} timesteps"
        facts["scale_rows"] = len(ours.scale_rows) or "static"
    if COMPANION_KEY in model.metadata_props:
        beside = CompanionFacts.from_metadata(model.metadata_props, str(path))
        facts |= beside.model_dump(mode="json", exclude={"io"}, exclude_none=True)
    return facts


def _layers(model: ir.Model) -> list[dict[str, Any]]:
    """Convolutions and products with constant weights: name, stored type, shape."""
    layers = []
    for node in model.graph:
        if node.op_type not in COMPUTE_OPS:
            continue
        source, seen = node.inputs[1] if len(node.inputs) > 1 else None, set[ir.Value]()
        while source is not None and ir.convenience.get_const_tensor(source) is None:
            producer = None if source in seen else source.producer()  # nodes of a file may form a circle
            seen.add(source)
            source = producer.inputs[0] if producer is not None and producer.inputs else None
            if producer is not None and producer.op_type not in {"DequantizeLinear", "Cast", "Transpose", "Reshape"}:
                source = None
        if source is not None:
            layers.append({"name": node.name or "", "weight": str(source.dtype), "shape": str(source.shape)})
    return layers
