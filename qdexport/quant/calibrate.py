"""Calibration: activation ranges from a run of the real sampler on the floating-point denoiser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdexport import __version__
from qdexport.core.files import digest_of
from qdexport.core.recipe import Calibration, Recipe
from qdexport.core.spec import LayerPlan
from qdexport.errors import ModelError, RecipeError
from qdexport.models.loaded import LoadedModel
from qdexport.models.sampling import OnProgress, SampleRequest, prompts_for, sample, schedule
from qdexport.quant.observers import NonFiniteError, RangeObserver, make_observer
from qdexport.quant.plan import activation_keys
from qdexport.quant.ranges import ActivationRanges
from qdexport.quant.resume import CalibrationState, weights_sha256

__all__ = ["calibrate", "calibration_prompts", "schedule_timesteps"]


def calibrate(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    *,
    state_dir: Path | None = None,
    on_progress: OnProgress | None = None,
) -> ActivationRanges:
    """Samples the recipe's prompts with the model's own scheduler and guidance, and watches every quantized
    layer's input.

    With ``state_dir`` what was seen is saved after each batch of prompts; a later call with the same model,
    prompts and observers goes on from there, to the same bits.

    Args:
        loaded: the floating-point model; left as it was.
        plans: what is quantized; an input shared by several layers is observed once.
        recipe: calibration settings, and whether each step has a row of its own.
        state_dir: where to save; None saves nothing.
        on_progress: called after each denoiser call with the calls done and their total.

    Raises:
        ModelError: NaN or infinity in an activation, or a layer that did not run in every step.
        RecipeError: the file of prompts cannot be used.
    """
    request = _request(loaded, recipe.calibration)
    timesteps = schedule_timesteps(loaded, recipe.calibration)
    per_step = recipe.activation_rows == "per_step"
    specs = {key: plan.activation for plan in plans for key in activation_keys(plan) if plan.activation is not None}
    observers = {
        key: make_observer(spec.observer, len(timesteps) if per_step else 1, name=key, seed=request.seed)
        for key, spec in specs.items()
    }
    state = None
    if state_dir is not None:
        observed = {key: spec.observer.model_dump() for key, spec in specs.items()}
        state = CalibrationState(state_dir, _digest(loaded, request, observed, per_step))
    watch = _Watch(plans, observers, timesteps, per_step)
    _sample_batches(loaded, request, watch, state, on_progress)
    ends = {key: observers[key].ranges(spec) for key, spec in specs.items()}
    return ActivationRanges(
        low={key: low for key, (low, _) in ends.items()},
        high={key: high for key, (_, high) in ends.items()},
        timesteps=timesteps,
    )


def schedule_timesteps(loaded: LoadedModel, calibration: Calibration) -> tuple[int, ...]:
    """The timesteps of the calibration's schedule, each once, in sampling order: the rows of step tables.

    Raises:
        ModelError: the model has no scheduler, or a timestep is fractional.
    """
    timesteps = schedule(loaded, calibration.steps)
    fractional = [step for step in timesteps if not float(step).is_integer()]
    if fractional:
        raise ModelError(
            f"the scheduler calls the denoiser at the fractional timestep {fractional[0]}; tables have rows "
            "for integers only: choose a scheduler of integer timesteps (DDIM, or timestep_spacing: leading)"
        )
    return tuple(dict.fromkeys(int(step) for step in timesteps))


def calibration_prompts(loaded: LoadedModel, calibration: Calibration) -> list[str]:
    """The prompts of a calibration: the first lines of the recipe's file, or the model's own.

    Raises:
        RecipeError: the file is missing or has too few lines.
    """
    if calibration.prompts_file is None:
        return prompts_for(loaded, calibration.prompts, calibration.seed)
    path = Path(calibration.prompts_file)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"calibration.prompts_file: cannot read {path}: {error}") from error
    if len(lines) < calibration.prompts:
        raise RecipeError(
            f"calibration.prompts_file: {path} has {len(lines)} prompts, calibration.prompts asks "
            f"for {calibration.prompts}; add lines or set calibration.prompts to {len(lines)}"
        )
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


def _digest(loaded: LoadedModel, request: SampleRequest, observed: dict[str, Any], per_step: bool) -> str:
    """Of everything that the observers' states depend on; widths and symmetry are not among it."""
    scheduler = dict(loaded.scheduler.config) if loaded.scheduler is not None else {}
    return digest_of(
        __version__,
        loaded.name,
        type(loaded.scheduler).__name__,
        scheduler,
        weights_sha256(loaded.denoiser),
        asdict(request),
        observed,
        per_step,
    )


class _Watch:
    """Forward hooks that feed the observers: each input is read at one layer, however many layers share
    it.
    """

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        observers: dict[str, RangeObserver],
        timesteps: tuple[int, ...],
        per_step: bool,
    ) -> None:
        self.observers = observers
        self.plans = {plan.group: plan for plan in reversed(plans) if plan.quantized}  # the first of each group
        self.rows = {timestep: index if per_step else 0 for index, timestep in enumerate(timesteps)}
        self.timestep = timesteps[0]
        self._reached: dict[str, set[int]] = {}

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

    def at(self, timestep: int) -> None:
        """Says which timestep the next denoiser call has.

        Raises:
            ModelError: it is none of the schedule's.
        """
        self.timestep = int(timestep)
        if self.timestep not in self.rows:
            raise ModelError(
                f"the sampler called the denoiser at timestep {timestep}, which is none of its "
                f"schedule ({', '.join(map(str, self.rows))}); "
                "use a scheduler that lists its timesteps before it starts"
            )

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

    def _observe(self, plan: LayerPlan, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        parts = torch.split_with_sizes(x, plan.splits, dim=1) if plan.splits else (x,)
        for key, part in zip(activation_keys(plan), parts, strict=True):
            try:
                self.observers[key].update(self.rows[self.timestep], part)
            except NonFiniteError as error:
                raise ModelError(
                    f"the input of layer {plan.name} is not finite at timestep {self.timestep}: {error}; "
                    "the floating-point model overflows there, load it with wider weights (FP32)"
                ) from error
        self._reached[plan.name].add(self.timestep)


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
