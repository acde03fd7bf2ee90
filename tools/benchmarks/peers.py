"""The columns of the comparison with ModelOpt, and what is measured in each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdexport.build.engine import BuildOptions, build_engine
from qdexport.build.plan import engine_coverage
from qdexport.build.storage import engine_weight_types
from qdexport.check.session import reference_session
from qdexport.core.io_spec import IoSpec
from qdexport.core.target import target_named
from qdexport.emit.inspect import load_onnx
from qdexport.errors import BuildError, ParityError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qdexport.core.results import Plan

__all__ = ["FORMATS", "MODELS", "Route", "failed", "finished", "routes", "rows_of"]

# what both are asked for, and our recipe that does it
_RECIPES = {"int8": "w8a8", "fp8": "fp8", "int4": "w4a16", "w4a8": "w4a8"}
FORMATS = tuple(_RECIPES)
MODELS = ("unet50m", "sdxl")  # of peer_model
# the type that a layer of the format has in a plan: of its product, of its weight where that alone is quantized
_IN_PLAN = {"int8": "int8", "fp8": "fp8", "w4a8": "int8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One column: a module of this folder, what it is told, and whether it runs in ModelOpt's environment."""

    name: str
    module: str
    spec: dict[str, str]
    foreign: bool


def routes(model: str, form: str) -> list[Route]:
    """The columns of one table.

    Args:
        model: one of ``MODELS``; of SDXL those in FP16 alone, since FP32 ones need more than 24 GB.
        form: one of ``FORMATS``.
    """
    bodies = ("fp16", "fp32") if model == "unet50m" else ("fp16",)
    columns = []
    for body in bodies:
        columns.append(_ours(model, form, body))
        columns.append(_modelopt(model, form, f"{body.upper()} example", ("example", body, body)))
        if model == "unet50m":
            columns.append(_modelopt(model, form, f"{body.upper()} deploy", ("deploy", "fp32", body)))
    return columns


def _modelopt(model: str, form: str, name: str, how: tuple[str, str, str]) -> Route:
    route, dtype, weights_dtype = how
    spec = {"model": model, "format": form, "route": route, "dtype": dtype, "weights_dtype": weights_dtype}
    return Route(name=f"ModelOpt {name}", module="benchmarks.modelopt_child", spec=spec, foreign=True)


def _ours(model: str, form: str, body: str) -> Route:
    spec = {"model": model, "format": form, "recipe": _RECIPES[form], "body": body}
    name = f"qdexport {spec['recipe']} {body.upper()}"
    return Route(name=name, module="benchmarks.qdexport_child", spec=spec, foreign=False)


def failed(route: Route, error: Exception) -> dict[str, Any]:
    """The column of a route whose process failed: the last thing that it said."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return {"name": route.name, "format": route.spec["format"], "model": route.spec["model"], "failed": said[-1]}


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
        "format": route.spec["format"],
        "model": route.spec["model"],
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
    return column | _built(route, folder, capability, answered)


def _built(route: Route, folder: Path, capability: str, answered: dict[str, Any]) -> dict[str, Any]:
    io = answered.get("io", {"inputs": [], "outputs": []})  # only dynamic shapes matter here; there are none
    options = BuildOptions(
        target=target_named("tensorrt-rtx"),
        io=IoSpec.model_validate(io),
        compute_capabilities=(capability,),
    )
    try:
        engine, plan = build_engine(folder / "onnx" / "model.onnx", folder / "engine", options)
    except BuildError as error:
        return {"rtx": str(error).splitlines()[0]}
    kept = _layers_in_plan(_with_module_paths(plan), route.spec["format"], answered)
    return {
        "kernels": engine.kernels,
        "kernels_by_type": engine.kernels_by_type,
        "int8_compute": engine.int8_compute,
        "fp8_compute": engine.fp8_compute,
        "fp_compute": engine.fp_compute,
        "layers_in_plan": kept,
        "engine_bytes": engine.bytes,
    }


def _layers_in_plan(plan: Plan, form: str, answered: dict[str, Any]) -> int:
    """How many layers that were to be quantized have the format's type in the plan."""
    layers = answered["layers_quantized"]
    if form in _IN_PLAN:
        return sum(kind == _IN_PLAN[form] for kind in engine_coverage(plan, layers).values())
    stored = engine_weight_types(plan, {name: answered["weights"][name] for name in layers})
    return sum(kind in {"int4", "int8"} for kind in stored.values())


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


def _text(column: dict[str, Any], key: str, pattern: str = "{}", scale: float = 1) -> str:
    """One number, ``-`` where the column does not have it."""
    if key not in column:
        return "-"
    return pattern.format(column[key] if scale == 1 else column[key] / scale)


def _accepted(column: dict[str, Any], key: str) -> str:
    if key not in column:
        return "-"
    return "yes" if column[key] is None else "no"


_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("quantize, s", lambda c: _text(c, "quantize_s", "{:.1f}")),
    ("export, s", lambda c: _text(c, "export_s", "{:.1f}")),
    ("both, CPU s", lambda c: _text(c, "cpu_s", "{:.1f}")),
    ("extra memory, MiB", lambda c: _text(c, "extra_mb", "{:.0f}")),
    ("extra memory / FP32 weights", lambda c: _text(c, "extra_mb", "{:.1f}", c.get("weights_mb", 1))),
    ("ONNX file, MB", lambda c: _text(c, "file_bytes", "{:.1f}", 1e6)),
    ("nodes", lambda c: _text(c, "nodes")),
    ("ONNX Runtime loads it", lambda c: _accepted(c, "ort")),
    ("TensorRT-RTX builds it", lambda c: _accepted(c, "rtx")),
    ("kernels", lambda c: _text(c, "kernels")),
    ("INT8 convs and gemms", lambda c: _text(c, "int8_compute")),
    ("FP8 convs and gemms", lambda c: _text(c, "fp8_compute")),
    ("FP convs and gemms", lambda c: _text(c, "fp_compute")),
    ("layers planned narrow", lambda c: _text(c, "layers_quantized")),
    ("  narrow in the plan", lambda c: _text(c, "layers_in_plan")),
    ("layers left out", lambda c: _text(c, "layers_excluded")),
    ("engine, MB", lambda c: _text(c, "engine_bytes", "{:.1f}", 1e6)),
)
