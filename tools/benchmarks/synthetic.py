"""Activation ranges for models with random weights: seeded, and different for every quantizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qdexport.quant.plan import activation_keys
from qdexport.quant.ranges import ActivationRanges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qdexport.core.spec import LayerPlan

__all__ = ["ddim_timesteps", "varied_ranges"]

_TEXT = "encoder_hidden_states"  # the group of all layers that read the text, which no step changes


def ddim_timesteps(steps: int) -> tuple[int, ...]:
    """The timesteps of Stable Diffusion's DDIM schedule, in sampling order."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=1000, steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    return tuple(int(timestep) for timestep in scheduler.timesteps)


def varied_ranges(
    plans: Sequence[LayerPlan], timesteps: tuple[int, ...], *, per_step: bool, seed: int
) -> ActivationRanges:
    """A range for every quantized input, none like another.

    Ends are log-normal around -4 and 4. With rows, a range drifts over the steps as those of trained models
    do, with a slope and a little noise of its own; the text's does not.

    Args:
        plans: what is quantized.
        timesteps: rows of the step tables, in sampling order.
        per_step: one row per timestep, or a single one.
        seed: chooses everything.
    """
    source = torch.Generator().manual_seed(seed)
    rows = len(timesteps) if per_step else 1
    progress = torch.linspace(-1, 1, rows, dtype=torch.float64) if rows > 1 else torch.zeros(1).double()
    low, high = {}, {}
    for key in dict.fromkeys(key for plan in plans for key in activation_keys(plan)):
        ends = 4 * torch.exp(0.5 * torch.randn(2, generator=source, dtype=torch.float64))
        slope = 0.3 * torch.randn(1, generator=source, dtype=torch.float64)
        noise = 0.05 * torch.randn(rows, generator=source, dtype=torch.float64)
        drift = torch.ones(1).double() if key == _TEXT else torch.exp(slope * progress + noise)
        low[key], high[key] = -ends[0] * drift, ends[1] * drift
    return ActivationRanges(low=low, high=high, timesteps=timesteps)
