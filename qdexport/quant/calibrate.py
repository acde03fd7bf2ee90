"""Calibration: activation ranges from a run of the real sampler on the floating-point denoiser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdexport import __version__
from qdexport.core.digests import digest_of, tree_sha256
from qdexport.core.reading import read_text, reading
from qdexport.core.recipe import Calibration, Recipe, SoftmaxQuant
from qdexport.core.spec import LayerPlan
from qdexport.core.timesteps import distinct, nearest_row
from qdexport.errors import ModelError, RecipeError
from qdexport.models.conditions import check_prompts
from qdexport.models.loaded import LoadedModel
from qdexport.models.sampling import OnProgress, SampleRequest, prompts_for, sample, schedule
from qdexport.models.schedules import timestep_dtype
from qdexport.quant.channel_scale import ChannelObserver
from qdexport.quant.modules import ChannelScale
from qdexport.quant.observers import HistogramObserver, NonFiniteError, RangeObserver, make_observer
from qdexport.quant.plan import activation_keys
from qdexport.quant.ranges import ActivationRanges
from qdexport.quant.resume import CalibrationState, weights_sha256
from qdexport.quant.softmax import SoftmaxParameters, attention_names, softmax_parameters, watched_softmax

__all__ = ["Observations", "calibrate", "calibration_prompts", "observe", "schedule_timesteps"]

# a pipeline in BF16 rounds fractional timesteps before it calls the denoiser, FLUX's twice: 2^-8 of the number each
_ROUNDED = 2.0**-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """What a run of the floating-point model showed; ranges for any widths come from the same statistics.

    Attributes:
        inputs: an observer by activation key.
        channels: ranges of single channels by activation group, where channel scales are asked for and not given.
        softmax: attention probabilities by attention block.
        timesteps: the sampler's timesteps, in sampling order.
        group_of_step: the table row that every timestep shares; empty when each has its own, or there is one row.
        threads: the numbers of threads that it was computed with, in their order: more than one when an interrupted
            run went on with another. Last bits of sums, and so of ranges, depend on it.
    """

    inputs: Mapping[str, RangeObserver]
    channels: Mapping[str, ChannelObserver]
    softmax: Mapping[str, HistogramObserver]
    timesteps: tuple[float, ...]
    group_of_step: tuple[int, ...] = ()
    threads: tuple[int, ...] = ()

    def ranges(self, plans: Sequence[LayerPlan]) -> ActivationRanges:
        """The ranges of the planned quantizers, whose observers must be those that were asked for."""
        low: dict[str, Tensor] = {}
        high: dict[str, Tensor] = {}
        for plan in plans:
            for key in activation_keys(plan):
                if key not in low and plan.activation is not None:
                    observer = self.inputs[key] if self.group_of_step else self.inputs[key].pooled()
                    ends = observer.ranges(plan.activation)
                    low[key], high[key] = (self._per_step(end) for end in ends)
        return ActivationRanges(low=low, high=high, timesteps=self.timesteps)

    def softmax_parameters(self, settings: SoftmaxQuant) -> dict[str, SoftmaxParameters]:
        """Modes and scales of the quantizers behind attention."""
        found = {}
        for name, observer in self.softmax.items():
            rows = range(len(observer.low))
            values = softmax_parameters(
                [observer.histogram(row) for row in rows], [float(observer.high[row]) for row in rows], settings
            )
            if len(values.scale) > 1:
                values = replace(values, scale=self._per_step(values.scale), mode=self._per_step(values.mode))
            found[name] = values
        return found

    def grouped(self, group_of_step: tuple[int, ...]) -> Observations:
        """The same with one row for each group of steps."""
        return replace(
            self,
            inputs={key: observer.merged(group_of_step) for key, observer in self.inputs.items()},
            softmax={
                name: joined
                for name, observer in self.softmax.items()
                if isinstance(joined := observer.merged(group_of_step), HistogramObserver)
            },
            group_of_step=group_of_step,
        )

    def _per_step(self, rows: Tensor) -> Tensor:
        """Rows of groups as rows of steps: tables always have a row per step, equal ones where steps share."""
        return rows[list(self.group_of_step)] if self.group_of_step else rows


def calibrate(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    *,
    state_dir: Path | None = None,
    on_progress: OnProgress | None = None,
) -> ActivationRanges:
    """The ranges that :func:`observe` finds for the planned widths; arguments and errors as there."""
    return observe(loaded, plans, recipe, state_dir=state_dir, on_progress=on_progress).ranges(plans)


def observe(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    *,
    channel_ratios: Mapping[str, Tensor] | None = None,
    state_dir: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Observations:
    """Samples the recipe's prompts with the model's own scheduler and guidance, and watches every quantized
    layer's input (without the first token of the text where that bypasses the quantizers), and the attention
    probabilities that the recipe quantizes.

    With ``state_dir`` what was seen is saved after each batch of prompts; a later call with the same model,
    prompts and observers goes on from there, to the same bits.

    Args:
        loaded: the floating-point model; left as it was.
        plans: what is quantized; an input shared by several layers is observed once.
        recipe: calibration settings, and whether each step has a row of its own.
        channel_ratios: by activation group, what the channels of the input are divided by; None observes the
            inputs as they are, and the ranges of their channels beside.
        state_dir: where to save; None saves nothing.
        on_progress: called after each denoiser call with the calls done and their total.

    Raises:
        ModelError: NaN or infinity in an activation, or a layer that did not run in every step.
        RecipeError: the file of prompts cannot be used.
    """
    request = _request(loaded, recipe.calibration)
    timesteps = schedule_timesteps(loaded, recipe.calibration)
    rows = 1 if recipe.activation_rows == "static" else len(timesteps)
    specs = {key: plan.activation for plan in plans for key in activation_keys(plan) if plan.activation is not None}
    inputs = {key: make_observer(spec.observer, rows) for key, spec in specs.items()}
    channels = {}
    if channel_ratios is None:
        scaled = {plan.group: plan for plan in plans if plan.channel_scale and plan.quantized}
        channels = {
            group: ChannelObserver(len(timesteps), 1 if plan.kind == "conv" else -1) for group, plan in scaled.items()
        }
    blocks = attention_names(loaded.denoiser, recipe.softmax)
    softmax = {name: HistogramObserver(rows) for name in blocks}
    everything: dict[str, RangeObserver] = {
        **inputs,
        **{f"channels:{group}": observer for group, observer in channels.items()},
        **{f"softmax:{name}": observer for name, observer in softmax.items()},
    }
    if not everything:  # weights alone are quantized
        return Observations(inputs={}, channels={}, softmax={}, timesteps=timesteps)
    state = None
    if state_dir is not None:
        observed = {key: spec.observer.model_dump() for key, spec in specs.items()}
        ratios = {group: ratio.tolist() for group, ratio in (channel_ratios or {}).items()}
        bypassed = sorted(plan.name for plan in plans if plan.bos and plan.quantized)
        extent = {"rows": rows, "ratios": ratios, "bos": bypassed, "others": sorted(set(everything) - set(inputs))}
        state = CalibrationState(state_dir, _digest(loaded, request, observed, extent), _state_name(channel_ratios))
    rounding = _ROUNDED if timestep_dtype(loaded) == "float32" else 0.0
    watch = _Watch(plans, everything, timesteps, channel_ratios or {}, rounding)
    with watched_softmax(loaded.denoiser, blocks, watch.probabilities):
        _sample_batches(loaded, request, watch, state, on_progress)
    threads = state.threads if state is not None else (torch.get_num_threads(),)
    return Observations(inputs=inputs, channels=channels, softmax=softmax, timesteps=timesteps, threads=threads)


def _state_name(channel_ratios: Mapping[str, Tensor] | None) -> str:
    # the run that finds the channel scales and the one that uses them are both found again
    return "calibration" if channel_ratios is None else "calibration-scaled"


def schedule_timesteps(loaded: LoadedModel, calibration: Calibration) -> tuple[float, ...]:
    """The timesteps of the calibration's schedule, each once, in sampling order: the rows of step tables.

    Raises:
        ModelError: the model has no scheduler.
    """
    return distinct(schedule(loaded, calibration.steps))


def calibration_prompts(loaded: LoadedModel, calibration: Calibration) -> list[str]:
    """The prompts of a calibration: the first lines of the recipe's file, or the model's own.

    Raises:
        RecipeError: the file is missing or has too few lines.
    """
    if calibration.prompts_file is None:
        return prompts_for(loaded, calibration.prompts, calibration.seed)
    path = Path(calibration.prompts_file)
    with reading("calibration.prompts_file", RecipeError):
        lines = [line.strip() for line in read_text(path, RecipeError).splitlines() if line.strip()]
    if len(lines) < calibration.prompts:
        raise RecipeError(
            f"calibration.prompts_file: {path} has {len(lines)} prompts, calibration.prompts asks "
            f"for {calibration.prompts}; add lines or set calibration.prompts to {len(lines)}"
        )
    check_prompts(loaded, lines)
    return lines[: calibration.prompts]


def _request(loaded: LoadedModel, calibration: Calibration) -> SampleRequest:
    guidance = calibration.guidance_scale
    return SampleRequest(
        prompts=tuple(calibration_prompts(loaded, calibration)),
        seed=calibration.seed,
        steps=calibration.steps or loaded.defaults.steps,
        guidance_scale=loaded.defaults.guidance_scale if guidance is None else guidance,
        batch_size=calibration.batch_size,
    )


def _digest(loaded: LoadedModel, request: SampleRequest, observed: dict[str, Any], extent: dict[str, Any]) -> str:
    """Of everything that the observers' states depend on; widths and symmetry are not among it."""
    scheduler = dict(loaded.scheduler.config) if loaded.scheduler is not None else {}
    parts = loaded.pipeline.components if loaded.pipeline is not None else {}
    others = {name: weights_sha256(part) for name, part in sorted(parts.items()) if isinstance(part, nn.Module)}
    return digest_of(
        __version__,
        loaded.name,
        # tokenizers have no weights, and what they make of a prompt is in the folder
        tree_sha256(loaded.folder) if loaded.folder is not None else "",
        type(loaded.scheduler).__name__,
        scheduler,
        weights_sha256(loaded.denoiser),
        others,
        asdict(request),
        observed,
        extent,
    )


class _Watch:
    """Forward hooks that feed the observers: each input is read at one layer, however many layers share
    it.
    """

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        observers: dict[str, RangeObserver],
        timesteps: tuple[float, ...],
        channel_ratios: Mapping[str, Tensor],
        rounding: float = 0.0,
    ) -> None:
        self.observers = observers
        self.rounding = rounding
        self.plans = {plan.group: plan for plan in reversed(plans) if plan.quantized}  # the first of each group
        self.steps = timesteps
        self.rows = {timestep: index for index, timestep in enumerate(timesteps)}
        self.timestep = timesteps[0]
        self._scales = {group: ChannelScale(ratio, self.plans[group].kind) for group, ratio in channel_ratios.items()}
        self._reached: dict[str, set[float]] = {}

    @contextlib.contextmanager
    def hooked(self, denoiser: nn.Module) -> Iterator[None]:
        """Watches the denoiser inside the block."""
        handles = [
            denoiser.get_submodule(plan.name).register_forward_pre_hook(partial(self._observe, plan), with_kwargs=True)
            for plan in self.plans.values()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin_batch(self) -> None:
        """Forgets which layers were reached."""
        self._reached = {plan.name: set() for plan in self.plans.values()}

    def at(self, timestep: float) -> None:
        """Says which timestep the next denoiser call has.

        Raises:
            ModelError: it is none of the schedule's.
        """
        row = nearest_row(self.steps, timestep, self.rounding)
        if row is None:
            raise ModelError(
                f"the sampler called the denoiser at timestep {timestep}, which is none of its "
                f"schedule ({', '.join(map(str, self.rows))}); "
                "use a scheduler that lists its timesteps before it starts"
            )
        self.timestep = self.steps[row]

    def end_batch(self) -> None:
        """Makes sure that every watched layer ran in every step.

        Raises:
            ModelError: one did not.
        """
        for layer, reached in self._reached.items():
            missing = [timestep for timestep in self.rows if timestep not in reached]
            if missing:
                raise ModelError(
                    f"layer {layer} did not run at timestep {missing[0]} ({len(missing)} of "
                    f"{len(self.rows)} steps are missing), so its range is unknown; leave it in floating "
                    "point by a rule without quantizers"
                )
        for observer in self.observers.values():
            observer.end_batch()

    def probabilities(self, block: str, values: Tensor) -> None:
        """Takes the attention probabilities of one call."""
        self._update(f"softmax:{block}", values, f"the attention of {block}")

    def _observe(self, plan: LayerPlan, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        x = x[:, 1:] if plan.bos else x
        where = f"the input of layer {plan.name}"
        if (key := f"channels:{plan.group}") in self.observers:
            self._update(key, x, where)
        x = self._scales[plan.group](x) if plan.group in self._scales else x
        parts = torch.split_with_sizes(x, plan.splits, dim=1) if plan.splits else (x,)
        for key, part in zip(activation_keys(plan), parts, strict=True):
            self._update(key, part, where)
        self._reached[plan.name].add(self.timestep)

    def _update(self, key: str, values: Tensor, where: str) -> None:
        observer = self.observers[key]
        try:
            observer.update(0 if len(observer.low) == 1 else self.rows[self.timestep], values)
        except NonFiniteError as error:
            raise ModelError(
                f"{where} is not finite at timestep {self.timestep}: {error}; "
                "the floating-point model overflows there, load it with wider weights (FP32)"
            ) from error


def _sample_batches(
    loaded: LoadedModel,
    request: SampleRequest,
    watch: _Watch,
    state: CalibrationState | None,
    on_progress: OnProgress | None,
) -> None:
    starts = range(0, len(request.prompts), request.batch_size)
    done = state.load(watch.observers) if state is not None else 0
    with watch.hooked(loaded.denoiser):
        for batch, start in enumerate(starts):
            if batch < done:
                continue

            watch.begin_batch()
            prompts = request.prompts[start : start + request.batch_size]
            sample(
                loaded,
                replace(request, prompts=prompts, seed=request.seed + start),
                on_call=lambda _step, timestep, _inputs: watch.at(timestep),
                on_progress=partial(_report, on_progress, batch, len(starts)),
            )
            watch.end_batch()
            if state is not None:
                state.save(watch.observers, batch + 1)


def _report(on_progress: OnProgress | None, batch: int, batches: int, done: int, calls: int) -> None:
    """Progress within one batch as progress of the whole; all batches make the same number of calls."""
    if on_progress is not None:
        on_progress(batch * calls + done, batches * calls)
