"""``report.html``: one self-contained page; every text of a model, a prompt or a builder is escaped."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qdexport.check.outcome import compiled_problems, in_short, picture_problems, verdict_of
from qdexport.core.files import write_text
from qdexport.report import charts, facts, pictures, tables

if TYPE_CHECKING:
    from pathlib import Path

    from qdexport.core.results import Plan, Report

__all__ = ["ReportInputs", "write_html"]

_MOST_ROWS = 12
_LARGEST_GRID = 1600
_NOTHING_OUTSIDE = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportInputs:
    """What the page is made of.

    Attributes:
        report: the machine-readable results.
        recipe_yaml: the recipe with its defaults.
        grid_png: an image grid, shown when there are no single ``images``.
        images: picture files per column (``fp``, ``quantized``, ``onnx``), in the order of ``prompts``.
        prompts: one caption per row of images.
        scales: activation scales per layer: one, or one for each of ``timesteps``.
        timesteps: the timesteps of the step rows, in the order of sampling.
        plan: the kernel plan of the engine.
        environment: what the results may depend on.
    """

    report: Report
    recipe_yaml: str = ""
    grid_png: Path | None = None
    images: dict[str, list[Path]] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    scales: dict[str, list[float]] = field(default_factory=dict)
    timesteps: list[float] = field(default_factory=list)
    plan: Plan | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a row, with its column's heading."""

    label: str
    image: pictures.Thumbnail


@dataclass(frozen=True, slots=True)
class PictureRow:
    """What all columns made of one prompt."""

    prompt: str
    pictures: tuple[Picture, ...]


def write_html(path: Path, inputs: ReportInputs) -> None:
    """Writes the page; sections of stages that did not run are left out.

    The page asks for nothing outside itself, and its content security policy would not let it: only its own
    script, known by its digest, runs.

    Raises:
        ValueError: ``scales`` and ``timesteps`` do not fit together.
        OutputError: the file cannot be written.
    """
    script, style = _resource("report.js.j2"), _resource("report.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            **_context(inputs),
            script=Markup(script),
            style=Markup(style),
            policy=f"{_NOTHING_OUTSIDE}; script-src 'sha256-{digest}'",
        )
    )
    write_text(path, page)


def _context(inputs: ReportInputs) -> dict[str, Any]:
    report = inputs.report
    limit = facts.sqnr_limit(report)
    parity = report.parity
    layers = tables.layer_rows(report, inputs.plan)
    verdict = verdict_of(report)
    return {
        "report": report,
        "verdict": verdict,
        "sentences": in_short(report),
        "badges": [("compiled", verdict.compiled), ("pictures", verdict.pictures)],
        "headlines": facts.headlines(report),
        "problems": [*compiled_problems(report), *picture_problems(report)],
        "quick": facts.QUICK,
        "rtx_caveat": facts.RTX_CAVEAT if report.target == "tensorrt-rtx" else "",
        "rows": _picture_rows(inputs),
        "grid": _grid(inputs),
        "other_seed": bool(inputs.images.get("other_seed")),
        "gain": pictures.DIFFERENCE_GAIN,
        "quality": tables.quality_rows(report.quality) if report.quality else [],
        "error_charts": charts.error_charts(report.quality.error_per_step) if report.quality else [],
        "sqnr_chart": charts.sqnr_chart(parity.layers, limit) if parity else None,
        "flip_chart": charts.flip_chart(parity.layers) if parity else None,
        "exact_layers": facts.exact_layers(parity) if parity else 0,
        "layers": layers,
        "errors": tables.error_rows(report.layer_errors) if report.layer_errors else [],
        "cost_bars": tables.cost_bars(report.cost) if report.cost else [],
        "nearest": facts.scale_rows(report.coverage) if report.coverage else "",
        "disagreeing": sum(not row.agrees for row in layers),
        "kernel_bars": tables.kernel_bars(report.engine.kernels_by_type) if report.engine else [],
        "stages": tables.stage_bars(report.stages),
        "total_seconds": sum(item.seconds for item in report.stages.values() if not item.cached),
        "plan": inputs.plan,
        "recipe_yaml": inputs.recipe_yaml,
        "environment": inputs.environment,
        **_scales(inputs),
    }


def _grid(inputs: ReportInputs) -> pictures.Thumbnail | None:
    if inputs.grid_png is None or inputs.images:
        return None
    return pictures.thumbnail(inputs.grid_png, _LARGEST_GRID)


def _scales(inputs: ReportInputs) -> dict[str, Any]:
    rows = max((len(values) for values in inputs.scales.values()), default=0)
    if rows > 1:
        heat = pictures.heat_map(inputs.scales, inputs.timesteps)
        values = {name: [float(f"{value:.4g}") for value in row] for name, row in inputs.scales.items()}
        return {"heat": heat, "heat_values": list(values.values()), "scale_chart": None}
    first = {name: values[0] for name, values in inputs.scales.items() if values}
    return {"heat": None, "heat_values": [], "scale_chart": charts.scale_chart(first) if first else None}


def _picture_rows(inputs: ReportInputs) -> list[PictureRow]:
    columns = {name: paths for name, paths in inputs.images.items() if paths}
    count = min([_MOST_ROWS, *(len(paths) for paths in columns.values())]) if columns else 0
    rows = []
    for index in range(count):
        made = [
            Picture(facts.label_of(name), pictures.thumbnail(paths[index])) for name, paths in columns.items()
        ]
        if {"fp", "quantized"} <= columns.keys():
            apart = pictures.difference(columns["fp"][index], columns["quantized"][index])
            made.append(Picture(f"Difference x {pictures.DIFFERENCE_GAIN}", apart))
        rows.append(PictureRow(inputs.prompts[index] if index < len(inputs.prompts) else "", tuple(made)))
    return rows


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("qdexport.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        db=facts.decibel, rate=facts.rate, number=facts.number, size=facts.size, duration=facts.duration
    )
    return made


def _resource(name: str) -> str:
    return (resources.files("qdexport.report") / "templates" / name).read_text(encoding="utf-8")
