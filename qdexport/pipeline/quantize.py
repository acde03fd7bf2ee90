"""From a loaded model and a recipe to a fake-quant model: every mechanism, in the one order in which they compose.

Splits, the text's first token and the time path decide what is observed; channel scales come before ranges, since
they change them; ranges before groups of steps; widths last, because the statistics serve all widths.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qdexport.core.bit_plan import BitPlan, apply_bit_plan
from qdexport.core.formats import check_formats
from qdexport.core.recipe import StepGroups
from qdexport.core.writing import output_errors, scratch_folder
from qdexport.models.denoiser import layer_macs, shortcut_splits, smallest_io, trace_denoiser
from qdexport.models.denoiser_io import io_spec, sized
from qdexport.quant.attach import QuantizedModel, quantize_model
from qdexport.quant.bos import decided_bos, find_bos
from qdexport.quant.calibrate import observe
from qdexport.quant.groups import group_steps
from qdexport.quant.partial import ScaledRanges
from qdexport.quant.plan import plan_layers
from qdexport.quant.reparameterize import choose_ratios

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from qdexport.core.progress import ProgressSink
    from qdexport.core.recipe import Recipe
    from qdexport.core.spec import LayerPlan
    from qdexport.core.target import Target
    from qdexport.models.loaded import LoadedModel
    from qdexport.quant.calibrate import Observations
    from qdexport.quant.ranges import ActivationRanges

__all__ = ["BIT_PLAN_FILE", "QuantizeSettings", "discard_calibration", "make_quantized", "observe_model", "plan_model"]

logger = logging.getLogger(__name__)

BIT_PLAN_FILE = "bits.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSettings:
    """How to quantize, beside what the recipe says.

    Attributes:
        target: bit allocation may count its time or bytes.
        folder: where unfinished work is kept (calibration, sensitivities); None keeps nothing.
        ranges: given ranges; the model is then not sampled.
        workers: processes for sensitivities; None: one per core.
        ray: address of a Ray cluster that measures sensitivities instead.
    """

    target: Target
    folder: Path | None = None
    ranges: ActivationRanges | None = None
    workers: int | None = None
    ray: str | None = None


def discard_calibration(folder: Path) -> None:
    """Removes what was kept for resuming: calibrations and measurements. Other files in the folder stay."""
    kept = ("calibration*.safetensors", BIT_PLAN_FILE, "sensitivity/*.json", "candidates/*.json")
    with output_errors(folder):
        for file in [file for pattern in kept for file in folder.glob(pattern)]:
            file.unlink(missing_ok=True)


def plan_model(loaded: LoadedModel, recipe: Recipe) -> list[LayerPlan]:
    """The decision of the recipe's rules (and of its file of widths, if it names one) for every layer."""
    trace = trace_denoiser(loaded.denoiser, smallest_io(loaded.denoiser))
    macs = layer_macs(loaded.denoiser, io_spec(loaded, recipe.shapes, "fp32"))
    splits = shortcut_splits(loaded.denoiser) if recipe.split_shortcuts else None
    plans = plan_layers(loaded.denoiser, decided_bos(loaded, recipe, trace), macs, splits, trace)
    return plans if recipe.bit_plan is None else apply_bit_plan(plans, BitPlan.load(Path(recipe.bit_plan)))


def make_quantized(
    loaded: LoadedModel, recipe: Recipe, settings: QuantizeSettings, progress: ProgressSink
) -> QuantizedModel:
    """Quantizes a model as a recipe says.

    Raises:
        RecipeError: the recipe does not fit the model, or a layer's format not the target.
        ModelError: the model cannot be sampled or observed, or lacks what a mechanism needs.
    """
    loaded = sized(loaded, recipe.shapes)
    plans = plan_model(loaded, recipe)
    check_formats(plans, settings.target)
    if settings.ranges is not None:
        return quantize_model(loaded, plans, recipe, _with_bos(settings.ranges, loaded, plans))
    observations, ratios = observe_model(loaded, plans, recipe, settings, progress)
    if recipe.bit_allocation is not None and recipe.bit_plan is None:
        seen = ScaledRanges(observations=observations, channel_ratios=ratios)
        plans = _allocate(loaded, plans, recipe, seen, settings, progress)
    ranges = replace(
        observations.ranges(plans),
        channel_ratios=ratios,
        softmax={} if recipe.softmax is None else observations.softmax_parameters(recipe.softmax),
    )
    model = quantize_model(loaded, plans, recipe, _with_bos(ranges, loaded, plans))
    return replace(model, threads=observations.threads)


def _with_bos(ranges: ActivationRanges, loaded: LoadedModel, plans: Sequence[LayerPlan]) -> ActivationRanges:
    """The ranges with the text's first token, where layers leave it out and the ranges lack it."""
    if ranges.bos is not None or not any(plan.bos and plan.quantized for plan in plans):
        return ranges
    return replace(ranges, bos=find_bos(loaded))


def observe_model(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    settings: QuantizeSettings,
    progress: ProgressSink,
) -> tuple[Observations, dict[str, torch.Tensor]]:
    """Watches the floating-point model sample; with channel scales twice, the second time behind them.

    Returns:
        What was seen, with the recipe's groups of steps, and the channel ratios by activation group.
    """
    with _percent(progress, "calibrating") as advance:
        observations = observe(loaded, plans, recipe, state_dir=settings.folder, on_progress=advance)
    ratios: dict[str, torch.Tensor] = {}
    if recipe.channel_scale is not None:
        with _percent(progress, "choosing channel scales") as advance:
            ratios = choose_ratios(loaded, plans, recipe, observations, advance)
        with _percent(progress, "calibrating behind channel scales") as advance:
            observations = observe(
                loaded, plans, recipe, channel_ratios=ratios, state_dir=settings.folder, on_progress=advance
            )
    if isinstance(recipe.activation_rows, StepGroups) and observations.inputs:
        observations = observations.grouped(_groups(observations, recipe.activation_rows))
    return observations, ratios


def _groups(observations: Observations, settings: StepGroups) -> tuple[int, ...]:
    ends = [(observer.low.clamp(max=0), observer.high.clamp(min=0)) for observer in observations.inputs.values()]
    low, high = (torch.stack([end[side] for end in ends], dim=1).numpy() for side in (0, 1))
    groups = group_steps(low, high, settings)
    logger.info("%d steps share %d rows of activation scales: %s", len(groups), max(groups) + 1, groups)
    return groups


def _allocate(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    observations: ScaledRanges,
    settings: QuantizeSettings,
    progress: ProgressSink,
) -> list[LayerPlan]:
    from qdexport.quant.allocation import allocate_bits
    from qdexport.quant.sensitivity import SweepRun
    from qdexport.quant.tasks import usual_workers

    with contextlib.ExitStack() as stack:
        folder = settings.folder or stack.enter_context(scratch_folder("qdexport-sweep-"))
        run = SweepRun(folder=folder, workers=usual_workers(settings.workers, settings.ray), progress=progress)
        plan = allocate_bits(loaded, plans, recipe, observations, settings.target, run)
        plan.save(folder / BIT_PLAN_FILE)
    return apply_bit_plan(plans, plan)


@contextlib.contextmanager
def _percent(progress: ProgressSink, description: str) -> Iterator[Callable[[int, int], None]]:
    """Turns ``(done, total)`` callbacks into a bar in percent."""
    shown = 0
    with progress.track(100, description) as advance:

        def show(done: int, total: int) -> None:
            nonlocal shown
            share = done * 100 // max(total, 1)
            advance(share - shown)
            shown = share

        yield show
