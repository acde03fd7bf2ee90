#!/usr/bin/env python3
"""Side by side with NVIDIA ModelOpt: the same 50 M UNet, quantized to INT8, exported and built, in one run.

ModelOpt runs in an environment of its own (.venv-peers, made on the first run, about 2 GB).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import click
import onnx
from benchmarks.children import run_module
from rich.console import Console
from rich.table import Table

from qdexport.build.engine import BuildOptions, build_engine
from qdexport.check.session import reference_session
from qdexport.cli.progress import Progress
from qdexport.core.io_spec import IoSpec
from qdexport.core.recipe import load_recipe
from qdexport.core.target import target_named
from qdexport.errors import BuildError, ParityError

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-peers"
PACKAGES = ("torch==2.13.0", "nvidia-modelopt[onnx]==0.47.0", "diffusers==0.42.1", "transformers", "accelerate")
ROUTES = (
    ("ModelOpt, example route, FP32", {"route": "example", "dtype": "fp32", "weights_dtype": "fp32"}),
    ("ModelOpt, example route, FP16", {"route": "example", "dtype": "fp16", "weights_dtype": "fp16"}),
    ("ModelOpt, deploy route, FP16 weights", {"route": "deploy", "dtype": "fp32", "weights_dtype": "fp16"}),
)


@click.command(epilog="\b\nExample:\n  python tools/bench_peers.py --out out/peers --json")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Keep graphs, engines and logs here.")
@click.option("--capability", default="8.9", show_default=True, help="Compute capability of the engines.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list on stdout.")
def main(out: Path | None, capability: str, as_json: bool) -> None:
    """Compare export time, memory, file size, nodes, ONNX Runtime, TensorRT-RTX, kernels and INT8 layers."""
    progress = Progress(quiet=as_json)
    with tempfile.TemporaryDirectory(prefix="qdexport-peers-") as scratch:
        folder = out or Path(scratch)
        rows = [_ours(folder / "qdexport", progress)]
        python = _peers_python(progress)
        for name, spec in ROUTES:
            where = folder / name.replace(", ", "-").replace(" ", "-")
            with progress.stage(name):
                answered = run_module(
                    "benchmarks.modelopt_child", {**spec, "threads": os.cpu_count(), "folder": str(where / "onnx")},
                    where, python,
                )
            rows.append(_row(name, answered, where, None))
        for row in rows:
            with progress.stage(f"{row['name']}: load and build"):
                _load_and_build(row, capability)
    _print(rows, as_json)


def _ours(folder: Path, progress: Progress) -> dict[str, Any]:
    recipe = load_recipe("w8a8")
    spec = {
        "model": "medium", "recipe": json.loads(recipe.model_dump_json()), "target": "tensorrt-rtx", "quantized": True,
        "steps": 25, "seed": 0, "folder": str(folder / "onnx"),
    }
    with progress.stage("qdexport, w8a8, FP16 body"):
        answered = run_module("benchmarks.export_child", spec, folder)
    return _row("qdexport, w8a8, FP16 body", answered, folder, IoSpec.model_validate(answered["io"]))


def _row(name: str, answered: dict[str, Any], folder: Path, io: IoSpec | None) -> dict[str, Any]:
    costs, path = answered["costs"], folder / "onnx" / "model.onnx"
    peak = max(costs["quantize"]["peak_rss_mb"], costs["export"]["peak_rss_mb"])
    extra = peak - costs["import"]["peak_rss_mb"] - answered["weight_bytes"] / 2**20
    quantized = answered["layers_quantized"]
    excluded = answered.get("layers_excluded", answered.get("layers_folded", 0))
    graph = onnx.load(str(path), load_external_data=False).graph
    return {
        "name": name,
        "quantize_s": costs["quantize"]["seconds"],
        "export_s": costs["export"]["seconds"],
        "export_cpu_s": costs["export"]["cpu_seconds"],
        "extra_ram_over_weights": round(extra / (answered["weight_bytes"] / 2**20), 2),
        "weights_mb": round(answered["weight_bytes"] / 1e6, 1),
        "file_mb": round(sum(item.stat().st_size for item in path.parent.iterdir()) / 1e6, 1),
        "nodes": len(graph.node),
        "int8_layers": quantized if isinstance(quantized, int) else len(quantized),
        "other_layers": excluded if isinstance(excluded, int) else len(excluded),
        "path": str(path),
        "io": io,
    }


def _load_and_build(row: dict[str, Any], capability: str) -> None:
    """Does ONNX Runtime load the file, and does TensorRT-RTX build it?"""
    path, io = Path(row.pop("path")), row.pop("io")
    try:
        reference_session(path)
        row["ort"] = "yes"
    except ParityError as error:
        row["ort"] = f"no: {error}"
    options = BuildOptions(
        target=target_named("tensorrt-rtx"), io=io or IoSpec(inputs=(), outputs=()), compute_capabilities=(capability,)
    )
    try:
        engine, _ = build_engine(path, path.parent.parent / "engine", options)
    except BuildError as error:
        row |= {"rtx": f"no: {str(error).splitlines()[0]}", "kernels": None, "int8_compute": None, "fp_compute": None}
        return
    row |= {
        "rtx": "yes", "kernels": engine.kernels, "int8_compute": engine.int8_compute, "fp_compute": engine.fp_compute,
        "engine_mb": round(engine.bytes / 1e6, 1),
    }


def _peers_python(progress: Progress) -> Path:
    """The interpreter of ModelOpt's environment, made when absent or half made."""
    python, stamp = PEERS / "bin" / "python", PEERS / "qdexport-ready"
    if not stamp.is_file():
        with progress.stage("installing ModelOpt into .venv-peers (some minutes)"):
            venv.create(PEERS, with_pip=True, clear=not python.exists())
            subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True, stdout=sys.stderr)
            stamp.write_text(" ".join(PACKAGES))
    return python


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for row in rows:
        table.add_column(row["name"], overflow="fold")
    for key in dict.fromkeys(key for row in rows for key in row if key != "name"):
        table.add_row(key.replace("_", " "), *(str(row.get(key, "-"))[:120] for row in rows))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
