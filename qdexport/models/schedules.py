"""The timesteps at which a model's scheduler calls the denoiser, as its pipeline would set them."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import numpy as np
from torch import nn

from qdexport.core.reading import reading
from qdexport.core.timesteps import TOLERANCE, whole_step
from qdexport.errors import ModelError
from qdexport.models.denoiser_classes import FLUX, SD3, config_of, family_of
from qdexport.models.library_logs import quiet_libraries
from qdexport.models.loaded import LoadedModel

__all__ = ["has_fractions", "scheduler_timesteps", "timestep_dtype", "timestep_rounding"]

_PROBE: Final = 7  # steps: no divisor of 999 or 1000, so that an even spacing has fractions if it may
# of diffusers' pipelines, where the scheduler's config does not say
_SHIFTS: Final = {FLUX: (0.5, 1.15), SD3: (0.5, 1.16)}


def timestep_dtype(model: LoadedModel | nn.Module) -> str:
    """`float32` where timesteps are fractions (flow matching, Euler schedules with linear spacing), else `int64`."""
    denoiser = model.denoiser if isinstance(model, LoadedModel) else model
    if timestep_rounding(denoiser) > 0:
        return "float32"
    return "float32" if isinstance(model, LoadedModel) and has_fractions(model) else "int64"


def timestep_rounding(denoiser: nn.Module) -> float:
    """By what share of itself a pipeline in half precision rounds a timestep before it calls the denoiser.

    0 but for the flow-matching families; also says that any real number may be a timestep of theirs.
    """
    return TOLERANCE if family_of(denoiser) in (SD3, FLUX) else 0.0


def has_fractions(loaded: LoadedModel) -> bool:
    """Whether the model's scheduler may call the denoiser at timesteps that are no whole numbers."""
    if loaded.scheduler is None:
        return False
    timesteps = scheduler_timesteps(loaded, loaded.defaults.steps)
    with contextlib.suppress(ModelError):  # few-step schedulers may not take so many
        timesteps += scheduler_timesteps(loaded, _PROBE)
    return any(isinstance(step, float) for step in timesteps)


def scheduler_timesteps(loaded: LoadedModel, steps: int | None) -> list[int | float]:
    """The timesteps of a run, one per call of the denoiser; whole numbers as int.

    Args:
        loaded: A model with a scheduler.
        steps: Sampler steps; None for the model's usual number.

    Raises:
        ModelError: The model has no scheduler, or the scheduler refuses the number of steps.
    """
    if loaded.scheduler is None:
        raise ModelError(f"{loaded.name} has no scheduler; give the whole pipeline's folder")
    count = steps or loaded.defaults.steps
    what = f"cannot sample in {count} steps"
    remedy = "give another number of steps, or another scheduler"
    with reading(type(loaded.scheduler).__name__, ModelError, remedy, what=what), quiet_libraries():
        # a copy: set_timesteps changes the scheduler that a pipeline may be using
        scheduler = type(loaded.scheduler).from_config(loaded.scheduler.config)
        scheduler.set_timesteps(count, **_settings(loaded, scheduler, count))
        return [float(step) if (whole := whole_step(step)) is None else whole for step in scheduler.timesteps.tolist()]


def _settings(loaded: LoadedModel, scheduler: Any, count: int) -> dict[str, Any]:
    """What the pipelines of flow-matching models give `set_timesteps` beside the number of steps."""
    family, config = family_of(loaded.denoiser), scheduler.config
    settings: dict[str, Any] = {}
    if family == FLUX and not config.get("use_flow_sigmas"):
        settings["sigmas"] = np.linspace(1.0, 1 / count, count)
    if config.get("use_dynamic_shifting") and family in _SHIFTS:
        settings["mu"] = _shift(loaded, config, _SHIFTS[family])
    return settings


def _shift(loaded: LoadedModel, config: Any, usual: tuple[float, float]) -> float:
    """The shift of the noise levels at the model's own size: linear in the number of image tokens."""
    height, width = loaded.defaults.height, loaded.defaults.width
    if height is None or width is None:
        raise ModelError(f"the schedule of {loaded.name} depends on its size, which its config does not say")
    patch = 2 if family_of(loaded.denoiser) == FLUX else int(config_of(loaded.denoiser)["patch_size"])
    tokens = (height // patch) * (width // patch)
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", usual[0]), config.get("max_shift", usual[1])
    slope = (high - low) / (last - first)
    return float(tokens * slope + low - slope * first)
