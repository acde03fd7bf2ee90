"""Facts about a quantized checkpoint for people, without loading the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from qdexport.core.reading import reading
from qdexport.errors import ModelError
from qdexport.quant.checkpoint import QUANTIZATION_FILE, read_facts

if TYPE_CHECKING:
    from pathlib import Path

    from qdexport.core.spec import QuantSpec
    from qdexport.quant.checkpoint import CheckpointFacts

__all__ = ["checkpoint_facts"]


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """Widths, granularity and scales of every layer.

    Raises:
        ModelError: the folder is no quantized checkpoint, or is damaged.
    """
    path = folder / QUANTIZATION_FILE
    facts = read_facts(path)
    with reading(path, ModelError, "quantize the model again", what="is damaged"):
        return _described_layers(path, facts)


def _described_layers(path: Path, facts: CheckpointFacts) -> dict[str, Any]:
    layers = []
    with safe_open(path, framework="np") as file:
        for plan in facts.plans:
            for part in plan.parts:
                row: dict[str, Any] = {
                    "name": part,
                    "weight": "folded" if plan.folded else facts.body,
                    "activation": "",
                    "scales": "",
                }
                if plan.quantized and plan.weight is not None and plan.activation is not None:
                    scales = file.get_tensor(f"{part}.input_scale")
                    row["weight"] = _described(plan.weight)
                    symmetry = "symmetric" if plan.activation.symmetric else "asymmetric"
                    form = plan.activation.format
                    row["activation"] = f"{plan.activation.bits} bits {symmetry}" if form == "int" else form
                    row["scales"] = f"{len(scales)} x {scales.min():.3g}..{scales.max():.3g}"
                elif plan.weight_only and plan.weight is not None:
                    row["weight"], row["activation"] = f"{_described(plan.weight)}, weight-only", facts.body
                layers.append({**row, "why": plan.why})
    return {
        "kind": "quantized checkpoint",
        "model": facts.model,
        "body": facts.body,
        "timesteps": len(facts.timesteps),
        "bytes": path.stat().st_size,
        "layers": layers,
    }


def _described(weight: QuantSpec) -> str:
    if weight.format == "nvfp4":
        return "nvfp4 in blocks of 16"
    name = f"{weight.bits} bits" if weight.format == "int" else weight.format
    return f"{name} {weight.granularity}" + (f" of {weight.block_size}" if weight.block_size else "")
