"""Quantizes and exports one synthetic model, measured: ``python -m benchmarks.export_child SPEC.json``."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.children import answer
from benchmarks.costs import Cost, measured
from qdexport.errors import QdExportError

if TYPE_CHECKING:
    from qdexport.core.recipe import Recipe
    from qdexport.core.target import Target
    from qdexport.models.loaded import LoadedModel
    from qdexport.pipeline.lower import Lowered

__all__ = ["main"]


def main(spec_path: str) -> None:
    """Writes ``<folder>/model.onnx`` and answers with costs and facts.

    The specification holds ``model``, ``recipe`` (as JSON), ``target``, ``quantized``, ``steps``, ``seed``
    and ``folder``.
    """
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    costs: dict[str, Cost] = {}
    with measured(costs, "import"):
        import diffusers
        import torch

        import qdexport.pipeline.lower  # noqa: F401  timed here, used below
    diffusers.utils.logging.set_verbosity_error()
    from qdexport.core.recipe import Recipe
    from qdexport.core.target import target_named
    from qdexport.models.load import loaded_from_denoiser
    from qdexport.models.synthetic import random_unet

    recipe, target = Recipe.model_validate(spec["recipe"]), target_named(spec["target"])
    with measured(costs, "load"):
        loaded = loaded_from_denoiser(random_unet(spec["model"], torch.float16), name=spec["model"])
    parameters = sum(parameter.numel() for parameter in loaded.denoiser.parameters())
    facts = {"parameters": parameters, "weight_bytes": _weight_bytes(loaded)}
    if spec["quantized"]:
        facts |= _export_quantized(loaded, recipe, target, spec, costs)
    else:
        facts |= _export_plain(loaded, recipe, target, spec, costs)
    answer(spec, {"costs": {name: asdict(cost) for name, cost in costs.items()}, **facts})


def _export_quantized(
    loaded: LoadedModel, recipe: Recipe, target: Target, spec: dict[str, Any], costs: dict[str, Cost]
) -> dict[str, Any]:
    from benchmarks.synthetic import ddim_timesteps, varied_ranges
    from qdexport.models.denoiser import layer_macs
    from qdexport.models.denoiser_io import io_spec
    from qdexport.pipeline.lower import lower_to_onnx
    from qdexport.quant.attach import quantize_model
    from qdexport.quant.plan import macs_share, plan_layers

    with measured(costs, "quantize"):
        macs = layer_macs(loaded.denoiser, io_spec(loaded, recipe.shapes, "fp16"))
        plans = plan_layers(loaded.denoiser, recipe, macs)
        per_step = recipe.activation_rows == "per_step"
        ranges = varied_ranges(plans, ddim_timesteps(spec["steps"]), per_step=per_step, seed=spec["seed"])
        model = quantize_model(loaded, plans, recipe, ranges)
    with measured(costs, "export"):
        lowered = lower_to_onnx(model, Path(spec["folder"]), target)
    return {
        "layers": len(plans),
        "layers_quantized": sum(plan.quantized for plan in plans),
        "layers_folded": sum(plan.folded for plan in plans),
        "macs_share": round(macs_share(plans), 4),
        "io": lowered.facts.io.model_dump(mode="json"),
        "onnx_bytes": lowered.file.bytes,
        "nodes": lowered.file.nodes,
        "passes": _pass_seconds(lowered),
    }


def _export_plain(
    loaded: LoadedModel, recipe: Recipe, target: Target, spec: dict[str, Any], costs: dict[str, Cost]
) -> dict[str, Any]:
    """The FP16 network as it is captured, without quantizers and passes."""
    from qdexport.capture.export import capture
    from qdexport.emit.onnx_file import emit
    from qdexport.models.denoiser_io import io_spec

    with measured(costs, "export"):
        io = io_spec(loaded, recipe.shapes, "fp16")
        file = emit(capture(loaded.denoiser, io).model, Path(spec["folder"]), target, {})
    return {"io": io.model_dump(mode="json"), "onnx_bytes": file.bytes, "nodes": file.nodes}


def _pass_seconds(lowered: Lowered) -> dict[str, float]:
    return {report.name: round(report.seconds, 3) for report in lowered.passes}


def _weight_bytes(loaded: LoadedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in loaded.denoiser.parameters())


if __name__ == "__main__":
    started = time.perf_counter()
    try:
        main(sys.argv[1])
    except QdExportError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    sys.stderr.write(f"done in {time.perf_counter() - started:.1f} s, load {os.getloadavg()[0]:.1f}\n")
