"""Another scheduler in the place of a model's own: one of diffusers', from the settings of the model's."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from dataclasses import replace
from typing import Any, Final

import yaml

from qdexport.core.reading import reading
from qdexport.errors import ModelError
from qdexport.models.library_logs import quiet_libraries
from qdexport.models.loaded import LoadedModel
from qdexport.models.schedules import timestep_rounding

__all__ = ["scheduler_names", "with_scheduler"]

_ENDINGS: Final = ("", "Scheduler", "DiscreteScheduler", "MultistepScheduler")
# what pipelines ask their schedulers for, if their own have it
_ASKED: Final = ("order", "init_noise_sigma", "scale_model_input")
_STEP: Final = ("self", "model_output", "timestep", "sample")
# what other programs call them
_ALIASES: Final = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++ 2m": "DPMSolverMultistepScheduler",
    "dpm++ 2s": "DPMSolverSinglestepScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2 a": "KDPM2AncestralDiscreteScheduler",
    "euler a": "EulerAncestralDiscreteScheduler",
    "eulerancestral": "EulerAncestralDiscreteScheduler",
}


def scheduler_names() -> list[str]:
    """The schedulers of the installed diffusers."""
    import diffusers

    return sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax"))


def with_scheduler(loaded: LoadedModel, choice: str) -> LoadedModel:
    """A model that samples with another scheduler; that of its pipeline is replaced.

    Args:
        loaded: a whole pipeline.
        choice: a class of diffusers, with or without the end of its name, and settings of it with commas:
            ``Euler,timestep_spacing=trailing``. Others are those of the model's own scheduler.

    Raises:
        ModelError: there is no such scheduler or setting, it cannot be made from the model's own, or one of the two is
            for flow matching alone.
    """
    name, *settings = [part.strip() for part in choice.split(",")]
    if loaded.scheduler is None or loaded.pipeline is None:
        raise ModelError(f"{loaded.name} has no scheduler to replace; give the whole pipeline's folder")
    cls = _class_of(name)
    if ("Flow" in cls.__name__) != (timestep_rounding(loaded.denoiser) > 0):
        own = type(loaded.scheduler).__name__
        raise ModelError(f"{cls.__name__} cannot take the place of {own}: only one of them is for flow matching")
    changes = dict(_setting(cls, part) for part in settings)
    _check_step(cls, loaded)
    with reading(f"scheduler {choice}", ModelError, what="cannot be made"), quiet_libraries():
        scheduler = cls.from_config(loaded.scheduler.config, **changes)
    missing = [name for name in _ASKED if hasattr(loaded.scheduler, name) and not hasattr(scheduler, name)]
    if missing:
        raise _of_another_kind(cls, loaded, f"it has no {missing[0]}")
    loaded.pipeline.register_modules(scheduler=scheduler)
    return replace(loaded, scheduler=scheduler)


def _check_step(cls: Any, loaded: LoadedModel) -> None:
    """Refuses a scheduler whose step needs more than prediction, timestep and sample: a picture, a mask, tokens."""
    if not callable(getattr(cls, "step", None)):
        raise _of_another_kind(cls, loaded, "it has no step")
    for function, known in ((cls.step, _STEP), (cls.__init__, ("self",))):
        needed = tuple(name for name, item in inspect.signature(function).parameters.items() if _is_required(item))
        if needed != known:
            others = [name for name in needed if name not in known]
            why = f"it needs {', '.join(others)}" if others else "it steps in another way"
            raise _of_another_kind(cls, loaded, why)


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind in (
        parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY,
    )  # fmt: skip


def _of_another_kind(cls: Any, loaded: LoadedModel, why: str) -> ModelError:
    return ModelError(
        f"{cls.__name__} was made for another kind of pipeline than {type(loaded.pipeline).__name__}: {why}; choose a "
        "scheduler like DDIM, Euler, DPMSolverMultistep or UniPC (for flow matching: FlowMatchEuler)"
    )


def _class_of(name: str) -> Any:
    import diffusers

    known = {entry.lower(): entry for entry in scheduler_names()}
    wanted = name.lower()
    found = next((known[wanted + end.lower()] for end in _ENDINGS if wanted + end.lower() in known), None)
    found = found or _ALIASES.get(wanted)
    if found is None:
        short = {entry.lower().removesuffix(end.lower()): entry for end in _ENDINGS[1:] for entry in known.values()}
        near = difflib.get_close_matches(wanted, [*short, *_ALIASES], n=3, cutoff=0.5)
        names = dict.fromkeys((_ALIASES | short)[entry] for entry in near)
        hint = f"did you mean {' or '.join(names)}?" if names else f"it has {', '.join(known.values())}"
        raise ModelError(f"diffusers {diffusers.__version__} has no scheduler {name!r}; {hint}")
    cls = getattr(diffusers, found)
    backends = getattr(cls, "_backends", None)
    if backends is not None:  # a package that it needs is missing: diffusers has a stand-in, which raises in any use
        packages = [package for package in backends if importlib.util.find_spec(package) is None]
        raise ModelError(f"{found} needs packages that are not installed: pip install {' '.join(packages or backends)}")
    return cls


def _setting(cls: Any, text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    if not equals or key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
        raise ModelError(f"{cls.__name__} has no setting {key!r}; {hint}")
    with reading(f"the value of {key}", ModelError, what="is no YAML"):
        return key, yaml.safe_load(value)
