"""Sensitivities and bit plans as results of their own (``qdexport sensitivity`` and ``qdexport allocate``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdexport.core.files import write_json
from qdexport.core.owned import written_into
from qdexport.core.recipe import BitAllocation
from qdexport.models.load import load_model
from qdexport.pipeline.quantize import QuantizeSettings, observe_model, plan_model
from qdexport.quant.allocation import allocate, checked_settings
from qdexport.quant.partial import ScaledRanges
from qdexport.quant.result_cache import SweepRun
from qdexport.quant.sensitivity import measure_sensitivity
from qdexport.quant.tasks import Workers
from qdexport.report.sensitivity_chart import save_scan_chart, save_sensitivity_chart

if TYPE_CHECKING:
    from qdexport.core.bit_plan import BitPlan
    from qdexport.core.progress import ProgressSink
    from qdexport.core.recipe import Recipe
    from qdexport.core.spec import LayerPlan
    from qdexport.core.target import Target
    from qdexport.models.loaded import LoadedModel
    from qdexport.quant.allocation import ScannedPlan
    from qdexport.quant.sensitivity_table import SensitivityTable

__all__ = ["AllocationJob", "with_allocation", "write_bit_plan", "write_sensitivity"]

_CACHE = ".calibration"
_SENSITIVITY = ["sensitivity.json", "sensitivity.png"]
_ALLOCATION = ["allocation.json", "allocation.png", "bits.yaml"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationJob:
    """What is asked for.

    Attributes:
        model: a bundled name, a diffusers folder, or a hub id.
        recipe: rules, calibration and ``bit_allocation``; a ``bit_plan`` in it is not read.
        target: whose bytes and times count.
        out: the output folder; unfinished work is kept in it, and another run goes on from it.
        workers: who measures.
        variant: of the model's weight files.
    """

    model: str
    recipe: Recipe
    target: Target
    out: Path
    workers: Workers = field(default_factory=Workers)
    variant: str | None = None


@dataclass(frozen=True, slots=True)
class _Prepared:
    loaded: LoadedModel
    plans: list[LayerPlan]
    ranges: ScaledRanges


def write_sensitivity(job: AllocationJob, progress: ProgressSink) -> SensitivityTable:
    """Measures all layers and writes ``sensitivity.json`` and ``sensitivity.png``.

    Raises:
        RecipeError: the recipe does not fit the model.
        ModelError: the model cannot be sampled.
    """
    with written_into(job.out, _SENSITIVITY):
        with progress.stage("calibrate"):
            prepared = _prepare(job, progress)
        with progress.stage("sensitivity"):
            run = _run(job, progress)
            table = measure_sensitivity(prepared.loaded, prepared.plans, job.recipe, prepared.ranges, run)
        _write_table(job, table)
    return table


def write_bit_plan(job: AllocationJob, progress: ProgressSink) -> BitPlan:
    """Allocates widths and writes ``bits.yaml``, ``allocation.json``, ``allocation.png`` and the sensitivities.

    Raises:
        RecipeError: the recipe does not fit the model, or asks for what no plan can have.
        ModelError: the model cannot be sampled.
    """
    checked_settings(job.recipe)  # before anything long is started
    with written_into(job.out, [*_SENSITIVITY, *_ALLOCATION]):
        with progress.stage("calibrate"):
            prepared = _prepare(job, progress)
        with progress.stage("allocate"):
            run = _run(job, progress)
            found = allocate(prepared.loaded, prepared.plans, job.recipe, prepared.ranges, job.target, run)
        _write_table(job, found.sensitivity)
        scanned = {"schema_version": 1, "scanned": [_facts(plan) for plan in found.scanned]}
        write_json(job.out / "allocation.json", scanned)
        save_scan_chart(job.out / "allocation.png", found.scanned)
        found.plan.save(job.out / "bits.yaml")
    return found.plan


def _prepare(job: AllocationJob, progress: ProgressSink) -> _Prepared:
    loaded = load_model(job.model, variant=job.variant)
    recipe = job.recipe.model_copy(update={"bit_plan": None})
    plans = plan_model(loaded, recipe)
    settings = QuantizeSettings(target=job.target, folder=job.out / _CACHE)
    observations, ratios = observe_model(loaded, plans, recipe, settings, progress)
    return _Prepared(loaded, plans, ScaledRanges(observations=observations, channel_ratios=ratios))


def _run(job: AllocationJob, progress: ProgressSink) -> SweepRun:
    return SweepRun(folder=job.out / _CACHE, workers=job.workers, progress=progress)


def _write_table(job: AllocationJob, table: SensitivityTable) -> None:
    table.save(job.out / "sensitivity.json")
    save_sensitivity_chart(job.out / "sensitivity.png", table)


def _facts(plan: ScannedPlan) -> dict[str, Any]:
    return {
        "part": plan.part,
        "level": plan.level,
        "split": plan.split,
        "average_bits": plan.average_bits,
        "scores": dict(plan.scores),
        "mse": plan.mse,
        "chosen": plan.chosen,
    }


def with_allocation(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with other values of ``bit_allocation``; its defaults where it has none."""
    current = recipe.bit_allocation or BitAllocation()
    return recipe.model_copy(
        update={"bit_allocation": BitAllocation.model_validate({**current.model_dump(), **changes})}
    )
