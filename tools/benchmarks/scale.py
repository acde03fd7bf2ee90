"""One synthetic model through quantize, export and build, every stage measured in its own process."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.children import run_module
from benchmarks.costs import Cost, machine
from qdexport.build.audit import audit
from qdexport.build.engine import BuildOptions, build_engine
from qdexport.build.plan import engine_coverage, plan_tensors
from qdexport.build.plan_cost import plan_cost
from qdexport.core.cost_model import CARDS
from qdexport.core.io_spec import IoSpec
from qdexport.models.configs import CONFIGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qdexport.core.progress import ProgressSink
    from qdexport.core.recipe import Recipe
    from qdexport.core.results import EngineFacts, Plan
    from qdexport.core.target import Target

__all__ = ["MODELS", "ScaleJob", "audited", "moved", "run_scale"]

# name on the command line -> configuration of qdexport.models.synthetic
MODELS = {
    "unet50m": "medium",
    "sd15": "sd15",
    "sd21": "sd21",
    "sdxl": "sdxl",
    "sdxl-turbo": "sdxl-turbo",
    "lcm": "lcm",
    "ddpm": "ddpm_cifar10",
    "ldm": "ldm_uncond",
    "dit": "dit",
    "pixart": "pixart",
    "sd3": "sd3",
    "flux-blocks": "flux-blocks",
    **{name: name for name in CONFIGS if name.startswith("tiny_")},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleJob:
    """What to measure.

    Attributes:
        model: a key of ``MODELS``.
        recipe: the whole recipe.
        target: with a builder.
        capabilities: compute capabilities of the engine; empty for the target's default.
        steps: sampling steps, the rows of the time table and of step tables.
        seed: chooses the activation ranges.
        parity: also compare every quantized layer of the ONNX file with PyTorch.
        fp16_baseline: also build the same UNet in FP16, to count its kernels.
        naive_baseline: also build the naive portable Q/DQ form of the same quantized UNet.
        folder: for everything that is written.
    """

    model: str
    recipe: Recipe
    target: Target
    capabilities: tuple[str, ...]
    steps: int
    seed: int
    parity: bool
    fp16_baseline: bool
    folder: Path
    naive_baseline: bool = False


def run_scale(job: ScaleJob, progress: ProgressSink) -> dict[str, Any]:
    """Compiles one model.

    Returns:
        Costs and counts, as docs/benchmarks.md describes them. ``bytes_ratio`` compares the engines' sizes with FP16,
        ``moved_ratio`` the bytes that one call moves (weights, and activations read and written), and
        ``naive_moved_ratio`` those with the naive form. ``seconds`` is the wall time of the exporting process (imports
        and making the weights included) and of the build; ``peak_rss_mb`` is that of the largest process. Neither
        counts parity and the baselines. ``mismatches`` has a sentence for every layer that is not of the type that was
        planned, in the file or in the engine.

    Raises:
        ChildError: quantizing or exporting failed.
        BuildError: the builder refused the graph or crashed.
        OutputError: the folder cannot be written.
    """
    before = machine()
    exported, (engine, plan), seconds = _compile(job, "quantized", progress)
    costs = {name: Cost(**cost) for name, cost in exported.pop("costs").items()}
    parity = costs.pop("parity", None)
    build = Cost(seconds=engine.build_seconds, cpu_seconds=0.0, peak_rss_mb=engine.peak_rss_mb)
    exported.pop("io")
    result = {
        "model": job.model,
        "recipe": job.recipe.name,
        "seconds": round(seconds - (parity.seconds if parity else 0.0), 1),
        "peak_rss_mb": max(cost.peak_rss_mb for cost in [*costs.values(), build]),
        "kernels": engine.kernels,
        "fp16_kernels": None,
        "int8_compute": engine.int8_compute,
        "fp_compute": engine.fp_compute,
        "bytes_ratio": None,
        "onnx_bytes": exported.pop("onnx_bytes"),
        "engine_bytes": engine.bytes,
        **moved(plan, engine.compute_capabilities),
        **audited(exported.pop("planned"), exported.pop("onnx"), plan),
        **exported,
        "kernels_by_type": engine.kernels_by_type,
        "compute_capabilities": engine.compute_capabilities,
        "builder_version": engine.builder_version,
        "stages": {name: asdict(cost) for name, cost in costs.items()},
        "machine": before,
    }
    if parity is not None:
        result["stages"]["parity"] = asdict(parity)
    result["stages"]["build"] = {"seconds": build.seconds, "peak_rss_mb": build.peak_rss_mb}
    if job.fp16_baseline:
        result |= _beside_fp16(job, result, progress)
    if job.naive_baseline:
        result |= _beside_naive(job, result, progress)
    return result


def _beside_fp16(job: ScaleJob, result: dict[str, Any], progress: ProgressSink) -> dict[str, Any]:
    plain, (baseline, plan), _ = _compile(job, "fp16", progress)
    facts = _moved_as("fp16", moved(plan, baseline.compute_capabilities), result)
    return facts | {
        "fp16_kernels": baseline.kernels,
        "fp16_onnx_bytes": plain["onnx_bytes"],
        "fp16_engine_bytes": baseline.bytes,
        "fp16_peak_rss_mb": max(baseline.peak_rss_mb, plain["costs"]["export"]["peak_rss_mb"]),
        "bytes_ratio": round(result["engine_bytes"] / baseline.bytes, 4),
        "moved_ratio": facts["fp16_moved_ratio"],
    }


def _beside_naive(job: ScaleJob, result: dict[str, Any], progress: ProgressSink) -> dict[str, Any]:
    _, (baseline, plan), _ = _compile(job, "naive", progress)
    return _moved_as("naive", moved(plan, baseline.compute_capabilities), result) | {"naive_kernels": baseline.kernels}


def _moved_as(prefix: str, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """A baseline's bytes and bound, and our bytes as a share of them (None where dimensions are known at run time)."""
    mine, other = (
        facts["moved_weight_bytes"] and facts["moved_weight_bytes"] + facts["moved_activation_bytes"]
        for facts in (ours, theirs)
    )
    ratio = round(mine / other, 4) if mine and other else None
    return {f"{prefix}_{name}": value for name, value in theirs.items()} | {f"{prefix}_moved_ratio": ratio}


def moved(plan: Plan, capabilities: Sequence[str]) -> dict[str, Any]:
    """Bytes that one call moves by the plan, and its roofline time on the first capability's card (a bound).

    All None where a dimension is known only at run time, or no rates are known for the card.
    """
    tensors = [tensor for kernel in plan.kernels for tensor in plan_tensors([*kernel.inputs, *kernel.outputs])]
    card = CARDS.get(capabilities[0]) if capabilities else None
    if card is None or any(dim < 0 for tensor in tensors for dim in tensor.dims):
        return {"moved_weight_bytes": None, "moved_activation_bytes": None, "predicted_microseconds": None}
    cost = plan_cost(plan, card)
    return {
        "moved_weight_bytes": round(cost.weight_bytes),
        "moved_activation_bytes": round(cost.activation_bytes),
        "predicted_microseconds": round(cost.seconds * 1e6, 1),
    }


def audited(planned: dict[str, str], onnx: dict[str, str], plan: Plan | None) -> dict[str, Any]:
    """Layers (or parts) by type as planned, in the file and in the engine, and a sentence for each that differs.

    Args:
        planned: types as planned.
        onnx: types in the ONNX file.
        plan: the kernels; None when nothing was built.
    """
    engine = None
    if plan is not None:
        engine = engine_coverage(plan, list(planned))
        for part, precision in planned.items():
            if precision == "folded" and engine[part] == "missing":
                engine[part] = "folded"
    tables = {"planned": planned, "onnx": onnx, "engine": engine or {}}
    return {
        "layers_by_type": {name: dict(sorted(Counter(table.values()).items())) for name, table in tables.items()},
        "mismatches": audit(planned, onnx, engine),
    }


def _compile(
    job: ScaleJob, form: Literal["quantized", "fp16", "naive"], progress: ProgressSink
) -> tuple[dict[str, Any], tuple[EngineFacts, Plan], float]:
    """Exports in a child process and builds in another; the exporter's answer, the engine, and seconds."""
    name = job.recipe.name if form == "quantized" else form
    # all of the network is quantized as it is, the time layers too
    changes = {"time_embedding": "keep", "allow_re_rounding": False} if form == "naive" else {}
    folder = job.folder / f"{job.model}-{name}"
    spec = {
        "model": MODELS[job.model],
        "recipe": json.loads(job.recipe.model_copy(update=changes).model_dump_json()),
        "target": job.target.name,
        "quantized": form != "fp16",
        "naive": form == "naive",
        "parity": job.parity and form == "quantized",
        "steps": job.steps,
        "seed": job.seed,
        "folder": str(folder / "onnx"),
    }
    started = time.perf_counter()
    with progress.stage(f"{job.model} {name}: export"):
        exported = run_module("benchmarks.export_child", spec, folder)
    options = BuildOptions(
        target=job.target, io=IoSpec.model_validate(exported["io"]), compute_capabilities=job.capabilities
    )
    with progress.stage(f"{job.model} {name}: build"):
        built = build_engine(folder / "onnx" / "model.onnx", folder / "engine", options)
    return exported, built, time.perf_counter() - started
