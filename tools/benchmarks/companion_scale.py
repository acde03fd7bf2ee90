"""Text encoders and VAE decoders of real sizes, random weights: exported and built, each in a process of its own."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.children import run_module
from benchmarks.costs import machine
from benchmarks.scale import moved
from qdexport.build.engine import BuildOptions, build_engine
from qdexport.core.io_spec import IoSpec
from qdexport.emit.facts import read_companion_facts
from qdexport.models.synthetic_companions import COMPANION_CONFIGS
from qdexport.pipeline.companions import audited_layers

if TYPE_CHECKING:
    from pathlib import Path

    from qdexport.core.progress import ProgressSink
    from qdexport.core.recipe import Shapes
    from qdexport.core.target import Target

__all__ = ["COMPANIONS", "CompanionJob", "run_companion", "show_companions"]

COMPANIONS = tuple(COMPANION_CONFIGS)
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CompanionJob:
    """What to measure.

    Attributes:
        model: one of ``COMPANIONS``.
        shapes: of the denoiser that it stands beside.
        target: with a builder.
        capabilities: compute capabilities of the engine.
        parity: also compare one call of the file with PyTorch.
        folder: for everything that is written.
    """

    model: str
    shapes: Shapes
    target: Target
    capabilities: tuple[str, ...]
    parity: bool
    folder: Path


def run_companion(job: CompanionJob, progress: ProgressSink) -> dict[str, Any]:
    """Compiles one network.

    Returns:
        Costs and counts, with the keys of a UNet's as far as they have a meaning here. ``mismatches`` has a sentence
        for every layer or attention kernel that does not compute in ``body``.

    Raises:
        ChildError: exporting failed.
        BuildError: the builder refused the graph or crashed.
    """
    before, started, folder = machine(), time.perf_counter(), job.folder / job.model
    spec = {
        "model": job.model,
        "shapes": job.shapes.model_dump(mode="json"),
        "target": job.target.name,
        "parity": job.parity,
        "folder": str(folder / "onnx"),
    }
    with progress.stage(f"{job.model}: export"):
        exported = run_module("benchmarks.companion_child", spec, folder)
    options = BuildOptions(
        target=job.target, io=IoSpec.model_validate(exported.pop("io")), compute_capabilities=job.capabilities
    )
    path = folder / "onnx" / "model.onnx"
    with progress.stage(f"{job.model}: build"):
        engine, plan = build_engine(path, folder / "engine", options)
    seconds = time.perf_counter() - started
    stages = exported.pop("costs")
    stages["build"] = {"seconds": engine.build_seconds, "peak_rss_mb": engine.peak_rss_mb}
    parity = stages.get("parity", {"seconds": 0.0})
    return {
        "model": job.model,
        "recipe": exported["body"],
        "seconds": round(seconds - parity["seconds"], 1),
        "peak_rss_mb": max(cost["peak_rss_mb"] for name, cost in stages.items() if name != "parity"),
        "kernels": engine.kernels,
        "kernels_by_type": dict(Counter(engine.kernels_by_type)),
        "attention_kernels": engine.attention_kernels,
        "int8_compute": engine.int8_compute,
        "fp_compute": engine.fp_compute,
        "engine_bytes": engine.bytes,
        **moved(plan, engine.compute_capabilities),
        **exported,
        **audited_layers(path, read_companion_facts(path), plan),
        "compute_capabilities": engine.compute_capabilities,
        "builder_version": engine.builder_version,
        "stages": stages,
        "machine": before,
    }


def show_companions(results: list[dict[str, Any]]) -> None:
    """Prints one table, a row per network."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"beside the denoiser, compute capability {', '.join(results[0]['compute_capabilities'])}")
    for column in ("", "type", "parameters, M", "ONNX MB", "engine MB", "kernels", "attention", "time s", "memory GB"):
        table.add_column(column, justify="left" if column in {"", "type"} else "right")
    for item in results:
        table.add_row(
            item["model"],
            item["body"],
            f"{item['parameters'] / 1e6:,.1f}",
            f"{item['onnx_bytes'] / 1e6:,.0f}",
            f"{item['engine_bytes'] / 1e6:,.0f}",
            str(item["kernels"]),
            str(item["attention_kernels"]),
            f"{item['seconds']:.1f}",
            f"{item['peak_rss_mb'] * _MIB / 1e9:.2f}",
        )
    Console().print(table)

