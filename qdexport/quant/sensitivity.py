"""Sensitivity of every quantized layer, one at a time, everything else in floating point (MixDQ).

Content layers are judged by the similarity of sampled images, quality layers by the SQNR of the denoiser's output:
the two metrics rank layers differently, and mixing them loses MixDQ's FID (37.35 against 17.03 in its ablation).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from qdexport.core.recipe import BitAllocation, Recipe
from qdexport.core.spec import LayerPlan
from qdexport.errors import ModelError
from qdexport.models.loaded import LoadedModel
from qdexport.models.sampling import SampleRequest, prompts_for
from qdexport.quant.bench import Bench, ModelSource, Reference, bench_digest, open_model, record
from qdexport.quant.layer_groups import group_of
from qdexport.quant.partial import (
    Ends,
    RangeSource,
    partly_quantized,
    plain_ends,
    ranges_from,
    unused_ranges,
    with_bits,
)
from qdexport.quant.ranges import ActivationRanges
from qdexport.quant.result_cache import CachedTask, ResultCache, SweepRun
from qdexport.quant.sensitivity_table import METRIC_OF_GROUP, Group, LayerSensitivity, Part, SensitivityTable
from qdexport.quant.tasks import Job

__all__ = ["SweepRun", "SweepTask", "measure_sensitivity", "open_bench", "reference_request", "sweep_tasks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTask(CachedTask):
    """One weight, or one activation, at some widths.

    Attributes:
        part: what is quantized.
        name: the layer, or the activation's group.
        group: decides the metric.
        plans: one layer, or all that share the activation's quantizer.
        widths: to be measured.
        ends: for activations, by width and activation key: the range's lows and highs, one per row.
        ratio: what the channels of the input are divided by; None where nothing is.
        timesteps: of the rows.
    """

    part: Part
    name: str
    group: Group
    plans: tuple[LayerPlan, ...]
    widths: tuple[int, ...]
    ends: Mapping[int, Ends]
    ratio: tuple[float, ...] | None
    timesteps: tuple[float, ...]

    def planned(self, bits: int) -> list[LayerPlan]:
        """The layers at a width."""
        if self.part == "weight":
            return [with_bits(plan, weight=bits) for plan in self.plans]
        return [with_bits(plan, activation=bits) for plan in self.plans]

    def ranges(self, bits: int) -> ActivationRanges:
        """The ranges of the layers' inputs at a width; of weights, where no input is quantized, any."""
        ratios = {plan.group: self.ratio for plan in self.plans if self.ratio is not None}
        return ranges_from(self.ends[bits], ratios, self.timesteps)


def measure_sensitivity(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    observations: RangeSource,
    run: SweepRun,
    parts: Sequence[Part] = ("weight", "activation"),
) -> SensitivityTable:
    """Measures every quantized layer at the widths of the recipe's bit allocation.

    Args:
        loaded: the floating-point model; left as it is.
        plans: what the rules decided; widths come from ``recipe.bit_allocation`` (its defaults without one).
        recipe: widths, images, calls and the seed.
        observations: of the floating-point model, by which every width gets its own ranges.
        run: where results are kept and who computes.
        parts: what is measured.

    Returns:
        One entry per layer (weights) and per activation group. Numbers do not depend on ``run``.

    Raises:
        ModelError: the model cannot be sampled, or a range is missing.
    """
    settings = recipe.bit_allocation or BitAllocation()
    model, source = open_model(loaded)
    request = reference_request(model, recipe, settings.images)
    steps = request.steps or model.defaults.steps
    tasks = sweep_tasks(plans, settings, observations, parts, steps)

    def job(missing: Sequence[SweepTask]) -> Job[Bench, SweepTask, LayerSensitivity]:
        groups = {task.group for task in missing}
        calls = settings.calls if "quality" in groups else 0
        reference = record(model, request, calls, images="content" in groups)
        return Job(prepare=open_bench(model, source, run, reference), run=_measured)

    cache = ResultCache(
        folder=run.folder / "sensitivity", base=bench_digest(model, request, settings.calls), kind=LayerSensitivity
    )
    entries = cache.run(tasks, job, run, "sensitivity")
    return SensitivityTable(model=loaded.name, recipe=recipe.name, entries=tuple(entries))


def open_bench(model: LoadedModel, source: ModelSource | None, run: SweepRun, reference: Reference) -> partial[Bench]:
    """What a worker does first: loads the model, unless it works in this process.

    Raises:
        ModelError: other processes are to work, and the model exists in this one's memory only.
    """
    if run.workers.count == 1 and run.workers.ray is None:
        return partial(Bench, loaded=model, reference=reference)
    if source is None:
        raise ModelError(f"{model.name} is in memory only; give its folder, or use one worker")
    return partial(_loaded_bench, source, reference)


def _loaded_bench(source: ModelSource, reference: Reference) -> Bench:
    return Bench(loaded=source.load(), reference=reference)


def reference_request(loaded: LoadedModel, recipe: Recipe, images: int) -> SampleRequest:
    """Prompts and sampler settings of the floating-point run: as in the calibration, with prompts of its own."""
    settings, calibration = recipe.bit_allocation or BitAllocation(), recipe.calibration
    guidance = calibration.guidance_scale
    return SampleRequest(
        prompts=tuple(prompts_for(loaded, images, settings.seed)),
        seed=settings.seed,
        steps=calibration.steps or loaded.defaults.steps,
        guidance_scale=loaded.defaults.guidance_scale if guidance is None else guidance,
        batch_size=min(images, calibration.batch_size),
    )


def sweep_tasks(
    plans: Sequence[LayerPlan],
    settings: BitAllocation,
    observations: RangeSource,
    parts: Sequence[Part],
    steps: int = 1,
) -> list[SweepTask]:
    """The tasks of a sweep: weights layer by layer, activations group by group.

    Args:
        plans: what the rules decided.
        settings: widths, content patterns, images and calls.
        observations: ranges for any widths.
        parts: what is measured.
        steps: of the sampler, for the costs.
    """
    quantized = [plan for plan in plans if plan.quantized]
    tasks = []
    if "weight" in parts:
        tasks += [_task("weight", plan.name, (plan,), settings, observations, steps) for plan in quantized]
    if "activation" in parts:
        groups: dict[str, list[LayerPlan]] = {}
        for plan in quantized:
            groups.setdefault(plan.group, []).append(plan)
        tasks += [
            _task("activation", name, tuple(members), settings, observations, steps) for name, members in groups.items()
        ]
    return tasks


def _task(
    part: Part,
    name: str,
    plans: tuple[LayerPlan, ...],
    settings: BitAllocation,
    observations: RangeSource,
    steps: int,
) -> SweepTask:
    group = group_of([plan.name for plan in plans], settings.content)
    if part == "activation":
        widths = settings.activation_bits
    else:
        widths = settings.content_weight_bits if group == "content" else settings.quality_weight_bits
    found = {bits: _ranges_at(part, plans, bits, observations) for bits in widths}
    rows = max(ranges.rows for ranges in found.values())
    ratio = found[widths[0]].channel_ratios.get(plans[0].group)
    cost = settings.images * steps if group == "content" else settings.calls
    return SweepTask(
        label=f"{name} ({part})",
        file=f"{part}-{name}.json",
        cost=cost * len(widths),
        part=part,
        name=name,
        group=group,
        plans=tuple(replace(plan, why="") for plan in plans),  # the reason decides nothing
        widths=tuple(widths),
        ends={bits: plain_ends(ranges) for bits, ranges in found.items()},
        ratio=None if ratio is None else tuple(ratio.tolist()),
        timesteps=tuple(found[widths[0]].timesteps) if rows > 1 else (),
    )


def _ranges_at(part: Part, plans: tuple[LayerPlan, ...], bits: int, observations: RangeSource) -> ActivationRanges:
    if part == "activation":
        return observations.ranges([with_bits(plan, activation=bits) for plan in plans])
    return unused_ranges(plans, observations)


def _measured(bench: Bench, task: SweepTask) -> LayerSensitivity:
    start = time.perf_counter()
    values = {}
    for bits in task.widths:
        denoiser = partly_quantized(
            bench.loaded.denoiser, task.planned(bits), task.ranges(bits), task.part, bench.training_steps
        )
        values[bits] = bench.ssim(denoiser) if task.group == "content" else bench.sqnr_db(denoiser)
    return LayerSensitivity(
        part=task.part,
        name=task.name,
        layers=tuple(plan.name for plan in task.plans),
        group=task.group,
        metric=METRIC_OF_GROUP[task.group],
        values=values,
        seconds=round(time.perf_counter() - start, 3),
    )
