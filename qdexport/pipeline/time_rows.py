"""Which timesteps get a row in the table that replaces the time layers of a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qdexport.core.precision import BYTES
from qdexport.core.timesteps import distinct, equal_reach, whole_step
from qdexport.errors import RecipeError
from qdexport.models.schedules import timestep_rounding
from qdexport.quant.attach import training_steps_of

if TYPE_CHECKING:
    from qdexport.quant.attach import QuantizedModel

__all__ = ["SMALL_SHARE", "SMALL_TABLE", "has_fractional_steps", "time_rows", "timestep_bounds"]

# A table of every timestep is read one row at a time, so it costs memory alone. It is small up to 32 MiB, which every
# GPU that runs a diffusion model has to spare, or up to a tenth of the weights at a byte each.
SMALL_TABLE: Final = 32 << 20
SMALL_SHARE: Final = 0.1


def has_fractional_steps(model: QuantizedModel) -> bool:
    """Whether the calibrated timesteps are no whole numbers, or lie outside the training range (EDM)."""
    last = training_steps_of(model.loaded) - 1
    return any(whole_step(step) is None or not 0 <= step <= last for step in model.timesteps)


def timestep_bounds(model: QuantizedModel, *, fractions: bool) -> tuple[float, float]:
    """The smallest and the largest timestep that the model may be called at."""
    last = training_steps_of(model.loaded) - (0 if fractions else 1)  # flow matching starts at the end of the range
    return min((0, *model.timesteps)), max((last, *model.timesteps))


def time_rows(model: QuantizedModel, columns: int | None = None, *, fractions: bool) -> tuple[float, ...] | None:
    """The timesteps with a row in the time table; None keeps the time layers.

    ``auto`` takes every timestep of the training where the table of them is small, else those of the schedule.

    Args:
        model: its recipe, its schedule, its weights.
        columns: numbers in one row; None takes the table to be small.
        fractions: whether the network's timestep is a floating-point number.

    Raises:
        RecipeError: the table needs a schedule and the model has none, or all of a model's timesteps are asked for and
            these are fractions.
    """
    choice = model.recipe.time_embedding
    if choice == "keep":
        return None
    flow = timestep_rounding(model.loaded.denoiser) > 0
    if choice == "all" and flow:
        raise RecipeError(
            "`time_embedding: all` has a row for every whole timestep, and this model's timesteps are fractions; "
            "say `steps` (one row per timestep of the schedule) or `keep` (leave the time layers in)"
        )
    if choice == "all" or (choice == "auto" and not flow and _wants_all(model, columns)):
        return _every_step(model) if fractions else tuple(range(training_steps_of(model.loaded)))
    if not model.timesteps:
        other = "`keep` (leave the time layers in)"
        raise RecipeError(
            f"`time_embedding: {choice}` needs the timesteps of a schedule, and this model was quantized without one; "
            f"say {other if flow else f'`all` (one row per training timestep) or {other}'}"
        )
    return distinct(model.timesteps) if fractions else model.timesteps


def _wants_all(model: QuantizedModel, columns: int | None) -> bool:
    """Whether `auto` takes every timestep: they mean something to the model, and their table is small."""
    if not model.timesteps:
        return True  # there is no schedule to take
    low, high = timestep_bounds(model, fractions=True)
    if low < 0 or high > training_steps_of(model.loaded):
        return False  # the model's timesteps are on another scale (EDM: logarithms of noise levels)
    size = training_steps_of(model.loaded) * (columns or 0) * BYTES[model.body]
    weights = sum(parameter.numel() for parameter in model.loaded.denoiser.parameters())
    return size <= max(SMALL_TABLE, SMALL_SHARE * weights)


def _every_step(model: QuantizedModel) -> tuple[float, ...]:
    """Every whole timestep, and the fractions of the model's own schedule."""
    whole = range(training_steps_of(model.loaded))
    reach = equal_reach(whole)
    others = [step for step in distinct(model.timesteps) if step > whole[-1] or abs(step - round(step)) > reach]
    return (*whole, *others)
