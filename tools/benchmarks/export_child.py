"""Quantizes and exports one synthetic model, measured: ``python -m benchmarks.export_child SPEC.json``."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.children import answer
from benchmarks.costs import Cost, measured
from qdexport.errors import QdExportError

if TYPE_CHECKING:
    from qdexport.core.recipe import Recipe
    from qdexport.core.target import Target
    from qdexport.graph.runner import GraphPass
    from qdexport.models.loaded import LoadedModel
    from qdexport.pipeline.lower import Lowered
    from qdexport.quant.attach import QuantizedModel

__all__ = ["ExportSettings", "export_quantized", "main"]

_INFINITE_DB = 999.0  # JSON has no infinity; as in reports of qdexport


def main(spec_path: str) -> None:
    """Writes ``<folder>/model.onnx`` and answers with costs and facts.

    The specification holds ``model``, ``recipe`` (as JSON), ``target``, ``quantized``, ``parity``, ``steps``,
    ``seed``, ``naive`` and ``folder``.
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
        settings = ExportSettings(
            recipe=recipe,
            target=target,
            steps=spec["steps"],
            seed=spec["seed"],
            parity=spec["parity"],
            folder=Path(spec["folder"]),
            naive=spec["naive"],
        )
        facts |= export_quantized(loaded, settings, costs)
    else:
        facts |= _export_plain(loaded, recipe, target, spec, costs)
    answer(spec, {"costs": {name: asdict(cost) for name, cost in costs.items()}, **facts})


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """How a model is quantized and exported.

    Attributes:
        recipe: the whole recipe.
        target: decides what is written.
        steps: sampling steps, the rows of the time table and of step tables.
        seed: chooses the activation ranges and what else is given.
        parity: compare every quantized layer of the file with PyTorch.
        folder: for ``model.onnx``.
        naive: run only the passes that turn fake quantizers into the portable Q/DQ form.
    """

    recipe: Recipe
    target: Target
    steps: int
    seed: int
    parity: bool
    folder: Path
    naive: bool = False


def export_quantized(loaded: LoadedModel, settings: ExportSettings, costs: dict[str, Cost]) -> dict[str, Any]:
    """Quantizes with given numbers, exports, and reads the types of all layers back.

    Returns:
        Facts that fit into JSON; ``planned`` and ``onnx`` are types by layer (or part), ``parity`` is None when it
        was not asked for.

    Raises:
        QdExportError: the recipe does not fit the model, or a stage failed.
    """
    from benchmarks.synthetic import synthetic_plans, synthetic_ranges, usual_timesteps
    from qdexport.pipeline.lower import lower_to_onnx
    from qdexport.quant.attach import quantize_model
    from qdexport.quant.plan import average_weight_bits, macs_share

    recipe = settings.recipe
    with measured(costs, "quantize"):
        plans = synthetic_plans(loaded, recipe, settings.seed)
        timesteps = usual_timesteps(loaded.denoiser, settings.steps)
        ranges = synthetic_ranges(loaded, plans, recipe, timesteps, settings.seed)
        model = quantize_model(loaded, plans, recipe, ranges)
    with measured(costs, "export"):
        passes = _naive_passes() if settings.naive else None
        lowered = lower_to_onnx(model, settings.folder, settings.target, passes=passes)
    return {
        "body": model.body,
        "layers": len(plans),
        "layers_quantized": sum(plan.quantized for plan in plans),
        "layers_folded": sum(plan.folded for plan in plans),
        "macs_share": round(macs_share(plans), 4),
        "average_weight_bits": round(average_weight_bits(model.denoiser, plans), 3),
        "io": lowered.facts.io.model_dump(mode="json"),
        "onnx_bytes": lowered.file.bytes,
        "nodes": lowered.file.nodes,
        "passes": _pass_seconds(lowered),
        **_types(model, lowered, settings.target),
        "parity": _parity(model, lowered, settings.seed, costs) if settings.parity else None,
    }


def _naive_passes() -> list[GraphPass]:
    """What turns fake quantizers into QuantizeLinear and DequantizeLinear, and nothing that makes the graph better."""
    from qdexport.passes.fold_adapters import FoldAdapters
    from qdexport.passes.legalize_types import LegalizeTypes
    from qdexport.passes.lower_bitwidth import LowerBitwidth
    from qdexport.passes.lower_log2 import LowerLog2
    from qdexport.passes.lower_timestep_scale import LowerTimestepScale
    from qdexport.passes.lower_zero_point import LowerZeroPoint

    return [FoldAdapters(), LowerLog2(), LowerZeroPoint(), LowerTimestepScale(), LowerBitwidth(), LegalizeTypes()]


def _types(model: QuantizedModel, lowered: Lowered, target: Target) -> dict[str, dict[str, str]]:
    """The type of every layer (or part) as it was planned, and as the file has it."""
    from qdexport.core.spec import layer_precision
    from qdexport.emit.coverage import onnx_coverage
    from qdexport.pipeline.lower import stores_int4_weights

    int4 = stores_int4_weights(model, target)
    planned = {part: layer_precision(plan, model.body, int4_linear=int4) for plan in model.plans for part in plan.parts}
    return {"planned": planned, "onnx": onnx_coverage(lowered.file.path, model.plans)}


def _parity(model: QuantizedModel, lowered: Lowered, seed: int, costs: dict[str, Cost]) -> dict[str, Any]:
    """Layer by layer on equal inputs, with the thresholds of ``qdexport compile``."""
    from qdexport.check.calls import check_calls
    from qdexport.check.parity import layer_parity
    from qdexport.check.verdict import layer_problems

    with measured(costs, "parity"):
        io = lowered.facts.io
        calls = check_calls(model, io, model.recipe.validation.parity_steps, seed)
        layers = layer_parity(model, lowered.file.path, io, calls)
    flipped, noisy = max(layers, key=lambda item: item.code_flip_rate), min(layers, key=lambda item: item.sqnr_db)
    return {
        "layers": len(layers),
        "calls": len(calls),
        "largest_flip_rate": flipped.code_flip_rate,
        "most_flipped": flipped.name if flipped.code_flip_rate > 0 else "",
        "least_sqnr_db": round(min(noisy.sqnr_db, _INFINITE_DB), 1),
        "least_exact": noisy.name,
        "problems": layer_problems(layers, model.body),
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
