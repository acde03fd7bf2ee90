"""Compares plans of widths on sampled images: the integer programs assume that errors add up, images do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from qdexport.core.recipe import BitAllocation, Recipe
from qdexport.core.spec import LayerPlan
from qdexport.models.loaded import LoadedModel
from qdexport.quant.bench import Bench, bench_digest, open_model, record
from qdexport.quant.partial import (
    Ends,
    QuantizedParts,
    RangeSource,
    partly_quantized,
    plain_ends,
    ranges_from,
    unused_ranges,
)
from qdexport.quant.result_cache import CachedTask, ResultCache, SweepRun
from qdexport.quant.sensitivity import open_bench, reference_request
from qdexport.quant.tasks import Job

__all__ = ["compare_plans", "spread"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateTask(CachedTask):
    """A whole plan.

    Attributes:
        parts: weights alone, or weights and activations.
        plans: of all layers.
        ends: of the inputs' ranges.
        ratios: of channels, by activation group.
        timesteps: of the rows.
    """

    parts: QuantizedParts
    plans: tuple[LayerPlan, ...]
    ends: Ends
    ratios: Mapping[str, tuple[float, ...]]
    timesteps: tuple[float, ...]


class CandidateError(BaseModel):
    """Mean squared pixel difference to the floating-point images; None when an image is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mse: float | None


def compare_plans(
    loaded: LoadedModel,
    candidates: Sequence[Sequence[LayerPlan]],
    parts: QuantizedParts,
    recipe: Recipe,
    observations: RangeSource,
    run: SweepRun,
) -> list[float | None]:
    """The pixel error of every candidate on the recipe's ``candidate_images``, in their order.

    Args:
        loaded: the floating-point model.
        candidates: plans of all layers.
        parts: "weight" leaves activations in floating point.
        recipe: images and seed.
        observations: ranges for any widths.
        run: where results are kept and who computes.
    """
    settings = recipe.bit_allocation or BitAllocation()
    model, source = open_model(loaded)
    request = reference_request(model, recipe, settings.candidate_images)
    steps = request.steps or model.defaults.steps
    tasks = [
        _task(number, parts, tuple(plans), observations, settings.candidate_images * steps)
        for number, plans in enumerate(candidates)
    ]

    def job(missing: Sequence[CandidateTask]) -> Job[Bench, CandidateTask, CandidateError]:
        del missing
        reference = record(model, request, 0, images=True)
        return Job(prepare=open_bench(model, source, run, reference), run=_measured)

    cache = ResultCache(folder=run.folder / "candidates", base=bench_digest(model, request, 0), kind=CandidateError)
    return [error.mse for error in cache.run(tasks, job, run, f"comparing plans ({parts})")]


def spread(count: int, wanted: int) -> list[int]:
    """Indices of ``wanted`` of ``count`` items at even distances, the first and the last among them."""
    if wanted >= count:
        return list(range(count))
    if wanted == 1:
        return [count // 2]
    return [round(index * (count - 1) / (wanted - 1)) for index in range(wanted)]


def _task(
    number: int, parts: QuantizedParts, plans: tuple[LayerPlan, ...], observations: RangeSource, cost: int
) -> CandidateTask:
    chosen = [plan for plan in plans if plan.quantized]
    ranges = unused_ranges(chosen, observations) if parts == "weight" else observations.ranges(chosen)
    used = {plan.group for plan in chosen if plan.channel_scale}
    return CandidateTask(
        label=f"candidate {number + 1}",
        file=f"{parts}-{number}.json",
        cost=cost,
        parts=parts,
        plans=plans,
        ends=plain_ends(ranges),
        ratios={group: tuple(ranges.channel_ratios[group].tolist()) for group in sorted(used)},
        timesteps=tuple(ranges.timesteps) if ranges.rows > 1 else (),
    )


def _measured(bench: Bench, task: CandidateTask) -> CandidateError:
    ranges = ranges_from(task.ends, task.ratios, task.timesteps)
    denoiser = partly_quantized(bench.loaded.denoiser, task.plans, ranges, task.parts, bench.training_steps)
    mse = bench.mse(denoiser)
    return CandidateError(mse=mse if mse < float("inf") else None)
