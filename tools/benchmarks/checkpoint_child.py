"""One part of tools/bench_export.py in its process: makes a quantized checkpoint, or exports one, measured."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.children import answer
from benchmarks.costs import Cost, measured
from qdexport.errors import QdExportError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(spec_path: str) -> None:
    """Answers with costs and sizes.

    The specification holds ``action`` (``make`` or ``export``), ``checkpoint``, and for ``make`` ``model``, ``changes``
    of its configuration and ``recipe`` (as JSON); for ``export`` ``target`` and ``onnx``, the folder to write.
    """
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    answer(spec, _make(spec) if spec["action"] == "make" else _export(spec))


def _make(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    from benchmarks.synthetic import ddim_timesteps, synthetic_plans, synthetic_ranges
    from qdexport.core.recipe import Recipe
    from qdexport.models.load import loaded_from_denoiser
    from qdexport.models.synthetic import random_unet
    from qdexport.quant.attach import quantize_model
    from qdexport.quant.checkpoint import save_quantized

    recipe = Recipe.model_validate(spec["recipe"])
    loaded = loaded_from_denoiser(random_unet(spec["model"], torch.float16, **spec["changes"]), name=spec["model"])
    plans = synthetic_plans(loaded, recipe, 0)
    ranges = synthetic_ranges(loaded, plans, recipe, ddim_timesteps(25), 0)
    save_quantized(quantize_model(loaded, plans, recipe, ranges), Path(spec["checkpoint"]))
    return {"parameters": sum(parameter.numel() for parameter in loaded.denoiser.parameters())}


def _export(spec: dict[str, Any]) -> dict[str, Any]:
    costs: dict[str, Cost] = {}
    with measured(costs, "import"):
        import qdexport.pipeline.lower
        import qdexport.quant.checkpoint
        from qdexport.core.target import target_named
    with measured(costs, "load"):
        model = qdexport.quant.checkpoint.load_quantized(Path(spec["checkpoint"]))
    with measured(costs, "export"):
        lowered = qdexport.pipeline.lower.lower_to_onnx(model, Path(spec["onnx"]), target_named(spec["target"]))
    folder = lowered.file.path.parent
    return {
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "layers": len(model.plans),
        "nodes": lowered.file.nodes,
        "onnx_bytes": _bytes_of([path for path in folder.iterdir() if path.name.startswith("model.onnx")]),
        "packed_bytes": _packed_bytes(lowered.file.path),
        "checkpoint_bytes": _bytes_of([path for path in Path(spec["checkpoint"]).rglob("*") if path.is_file()]),
    }


def _bytes_of(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _packed_bytes(path: Path) -> int:
    """What the different constants of a file need by themselves."""
    from qdexport.emit.inspect import load_onnx

    values = load_onnx(path).graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except QdExportError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
