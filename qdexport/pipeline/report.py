"""Writes ``report.html`` next to ``report.json``, from what the stages left in the output folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdexport.check.outcome import verdict_of
from qdexport.check.quality import OTHER_SEED
from qdexport.core.results import Plan
from qdexport.models.sampling import prompts_for
from qdexport.pipeline.workspace import Made
from qdexport.quant.attach import scales_by_layer
from qdexport.report.html import ReportInputs, write_html

if TYPE_CHECKING:
    from pathlib import Path

    from qdexport.pipeline.workspace import Workspace
    from qdexport.quant.attach import QuantizedModel

__all__ = ["write_report"]

_SHOWN_IMAGES = 12
_COLUMNS = ("fp", "quantized", "onnx", OTHER_SEED)


def write_report(model: QuantizedModel, workspace: Workspace) -> Path:
    """Writes the page and enters it in the manifest."""
    workspace.report.verdict = verdict_of(workspace.report)
    folder = workspace.root / "images"
    ours = sorted(workspace.ours(folder))
    images = {
        column: [folder / name for name in ours if name.startswith(f"{column}/")][:_SHOWN_IMAGES]
        for column in _COLUMNS
        if (folder / column).is_dir()
    }
    validation = model.recipe.validation
    plan = workspace.manifest.artifact("plan")
    scales = scales_by_layer(model)
    inputs = ReportInputs(
        report=workspace.report,
        recipe_yaml=model.recipe.to_yaml(),
        images=images,
        prompts=prompts_for(model.loaded, validation.images, validation.seed)[:_SHOWN_IMAGES] if images else [],
        scales=scales,
        timesteps=list(model.timesteps) if any(len(rows) > 1 for rows in scales.values()) else [],
        plan=Plan.load(workspace.path("plan")) if plan else None,
        environment=workspace.manifest.environment,
    )
    path = workspace.root / "report.html"
    workspace.claim([path])
    write_html(path, inputs)
    workspace.record("report", workspace.inputs("report"), [Made("report", path)])
    return path
