"""The columns of the comparison with ModelOpt, and what is measured in each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdexport.build.engine import BuildOptions, build_engine
from qdexport.build.plan import engine_coverage
from qdexport.check.session import reference_session
from qdexport.core.io_spec import IoSpec
from qdexport.core.target import target_named
from qdexport.emit.inspect import load_onnx
from qdexport.errors import BuildError, ParityError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qdexport.core.results import Plan

__all__ = ["ROUTES", "Route", "finished", "rows_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One column: a module of this folder, what it is told, and whether it runs in ModelOpt's environment."""

    name: str
    module: str
    spec: dict[str, str]
    foreign: bool


def _modelopt(name: str, route: str, dtype: str, weights_dtype: str) -> Route:
    spec = {"route": route, "dtype": dtype, "weights_dtype": weights_dtype}
    return Route(name=f"ModelOpt {name}", module="benchmarks.modelopt_child", spec=spec, foreign=True)


def _ours(name: str, body: str) -> Route:
    return Route(name=f"qdexport {name}", module="benchmarks.qdexport_child", spec={"body": body}, foreign=False)


ROUTES = (
    _ours("FP16", "fp16"),
    _modelopt("FP16 example", "example", "fp16", "fp16"),
    _modelopt("FP16 deploy", "deploy", "fp32", "fp16"),
    _ours("FP32", "fp32"),
    _modelopt("FP32 example", "example", "fp32", "fp32"),
    _modelopt("FP32 deploy", "deploy", "fp32", "fp32"),
)


def finished(route: Route, answered: dict[str, Any], folder: Path, capability: str) -> dict[str, Any]:
    """Loads and builds what a child exported.

    Returns:
        All rows of the column. ``extra_mb`` is the exporting process' largest memory during quantize and
        export, less what it had after its imports, less the FP32 weights. ``ort`` and ``rtx`` are None on
        success, else the reason.
    """
    costs, path = answered["costs"], folder / "onnx" / "model.onnx"
    peak = max(costs[stage]["peak_rss_mb"] for stage in ("quantize", "export"))
    weights_mb = answered["weight_bytes"] / (1 << 20)
    column: dict[str, Any] = {
        "name": route.name,
        "quantize_s": costs["quantize"]["seconds"],
        "export_s": costs["export"]["seconds"],
        "cpu_s": round(costs["quantize"]["cpu_seconds"] + costs["export"]["cpu_seconds"], 1),
        "extra_mb": round(peak - answered["base_mb"] - weights_mb, 1),
        "weights_mb": round(weights_mb, 1),
        "file_bytes": sum(item.stat().st_size for item in path.parent.iterdir()),
        "nodes": len(load_onnx(path).graph),
        "layers_quantized": len(answered["layers_quantized"]),
        "layers_excluded": len(answered["layers_excluded"]),
        "ort": None,
        "rtx": None,
        "versions": answered["versions"],
    }
    try:
        reference_session(path)
    except ParityError as error:
        column["ort"] = str(error)
    return column | _built(path, folder, capability, answered)


def _built(path: Path, folder: Path, capability: str, answered: dict[str, Any]) -> dict[str, Any]:
    io = answered.get("io", {"inputs": [], "outputs": []})  # only dynamic shapes matter here; there are none
    options = BuildOptions(
        target=target_named("tensorrt-rtx"),
        io=IoSpec.model_validate(io),
        compute_capabilities=(capability,),
    )
    try:
        engine, plan = build_engine(path, folder / "engine", options)
    except BuildError as error:
        return {"rtx": str(error).splitlines()[0]}
    coverage = engine_coverage(_with_module_paths(plan), answered["layers_quantized"])
    return {
        "kernels": engine.kernels,
        "kernels_by_type": engine.kernels_by_type,
        "int8_compute": engine.int8_compute,
        "fp_compute": engine.fp_compute,
        "layers_int8_in_plan": sum(kind == "int8" for kind in coverage.values()),
        "engine_bytes": engine.bytes,
    }


def _with_module_paths(plan: Plan) -> Plan:
    """The plan with TorchScript's node names (``/down_blocks.0/conv/Conv``) as ours (``down_blocks.0.conv/Conv``)."""
    kernels = []
    for kernel in plan.kernels:
        nodes = [_module_path(node) if node.startswith("/") else node for node in kernel.nodes]
        kernels.append(kernel.model_copy(update={"nodes": nodes}))
    return plan.model_copy(update={"kernels": kernels})


def _module_path(node: str) -> str:
    module, _, operator = node.removeprefix("/").rpartition("/")
    return f"{module.replace('/', '.')}/{operator}"


def rows_of(columns: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Labels and cells of the table."""
    return [(label, [cell(column) for column in columns]) for label, cell in _ROWS]


def _known(column: dict[str, Any], key: str) -> str:
    return str(column[key]) if key in column else "-"


_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("quantize, s", lambda c: f"{c['quantize_s']:.1f}"),
    ("export, s", lambda c: f"{c['export_s']:.1f}"),
    ("both, CPU s", lambda c: f"{c['cpu_s']:.1f}"),
    ("extra memory, MiB", lambda c: f"{c['extra_mb']:.0f}"),
    ("extra memory / FP32 weights", lambda c: f"{c['extra_mb'] / c['weights_mb']:.1f}"),
    ("ONNX file, MB", lambda c: f"{c['file_bytes'] / 1e6:.1f}"),
    ("nodes", lambda c: f"{c['nodes']}"),
    ("ONNX Runtime loads it", lambda c: "yes" if c["ort"] is None else "no"),
    ("TensorRT-RTX builds it", lambda c: "yes" if c["rtx"] is None else "no"),
    ("kernels", lambda c: _known(c, "kernels")),
    ("INT8 convs and gemms", lambda c: _known(c, "int8_compute")),
    ("FP convs and gemms", lambda c: _known(c, "fp_compute")),
    ("layers planned INT8", lambda c: f"{c['layers_quantized']}"),
    ("  INT8 in the plan", lambda c: _known(c, "layers_int8_in_plan")),
    ("layers left out", lambda c: f"{c['layers_excluded']}"),
    ("engine, MB", lambda c: f"{c['engine_bytes'] / 1e6:.1f}" if "engine_bytes" in c else "-"),
)
