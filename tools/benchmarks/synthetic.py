"""What calibration and allocation would find, for models with random weights: seeded, different for every quantizer."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qdexport.core.recipe import StepGroups
from qdexport.errors import RecipeError
from qdexport.models.schedules import timestep_dtype
from qdexport.pipeline.quantize import plan_model
from qdexport.quant.bos import Bos
from qdexport.quant.channel_scale import cut_off
from qdexport.quant.groups import uniform_groups
from qdexport.quant.layer_groups import chosen_layers, group_of
from qdexport.quant.plan import activation_keys
from qdexport.quant.ranges import ActivationRanges
from qdexport.quant.softmax import SoftmaxParameters, attention_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Generator, Tensor, nn

    from qdexport.core.recipe import BitAllocation, ChannelScale, Recipe, SoftmaxQuant
    from qdexport.core.spec import LayerPlan
    from qdexport.models.loaded import LoadedModel

__all__ = [
    "ddim_timesteps",
    "random_widths",
    "step_groups",
    "synthetic_plans",
    "synthetic_ranges",
    "usual_timesteps",
    "varied_ranges",
]

_TEXT = "encoder_hidden_states"  # the group of all layers that read the text, which no step changes
_STEPS_PER_GROUP = 4  # of clustered groups, on average
_BOS_OUTLIER = -28.0  # about what SD 1.5's text encoder has in one channel of its first token
_FULL_BITS = 8  # the width that targets in bytes and time are shares of


def ddim_timesteps(steps: int) -> tuple[int, ...]:
    """The timesteps of Stable Diffusion's DDIM schedule, in sampling order."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=1000, steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    return tuple(int(timestep) for timestep in scheduler.timesteps)


def usual_timesteps(denoiser: nn.Module, steps: int) -> tuple[float, ...]:
    """A schedule of the denoiser's family, in sampling order: DDIM's, or that of flow matching with a shift of 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if timestep_dtype(denoiser) == "int64":
        return ddim_timesteps(steps)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return tuple(scheduler.timesteps.tolist())


def synthetic_plans(loaded: LoadedModel, recipe: Recipe, seed: int) -> list[LayerPlan]:
    """The recipe's plans; with bit allocation random widths about its targets stand for those of the allocator.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    plans = _plans_with_first_token(loaded, recipe)
    if recipe.bit_allocation is None or recipe.bit_plan is not None:
        return plans
    return random_widths(plans, loaded.denoiser, recipe.bit_allocation, seed)


def _plans_with_first_token(loaded: LoadedModel, recipe: Recipe) -> list[LayerPlan]:
    """A network alone has no text encoder to ask: `bos: auto` is `constant` where cross-attention reads the text."""
    if recipe.bos == "auto":
        with contextlib.suppress(RecipeError):
            return plan_model(loaded, recipe.model_copy(update={"bos": "constant"}))
    return plan_model(loaded, recipe)


def synthetic_ranges(
    loaded: LoadedModel, plans: Sequence[LayerPlan], recipe: Recipe, timesteps: tuple[float, ...], seed: int
) -> ActivationRanges:
    """All numbers that the recipe's mechanisms need beside the weights.

    Args:
        loaded: the model.
        plans: what is quantized how.
        recipe: says which mechanisms there are.
        timesteps: rows of the step tables, in sampling order.
        seed: chooses everything; each mechanism has a generator of its own, so that none changes another's numbers.
    """
    groups = step_groups(recipe, len(timesteps), seed)
    ranges = varied_ranges(plans, timesteps, groups=groups, seed=seed)
    return replace(
        ranges,
        channel_ratios={}
        if recipe.channel_scale is None
        else _channel_ratios(loaded, plans, recipe.channel_scale, seed),
        softmax={} if recipe.softmax is None else _softmax(loaded, recipe.softmax, groups, seed),
        bos=_first_token(loaded, plans, seed),
    )


def step_groups(recipe: Recipe, steps: int, seed: int) -> tuple[int, ...] | None:
    """The group of every step, numbered from 0: all of its own with rows per step, None where one row serves all.

    Clustered groups are stretches of random lengths.
    """
    rows = recipe.activation_rows
    if not isinstance(rows, StepGroups):
        return tuple(range(steps)) if rows == "per_step" else None
    if rows.method == "uniform":
        return uniform_groups(steps, rows.count or steps)
    count = min(rows.count or max(1, steps // _STEPS_PER_GROUP), steps)
    cuts = torch.randperm(steps - 1, generator=_generator(seed, 1))[: count - 1] + 1
    return tuple(int((cuts <= step).sum()) for step in range(steps))


def varied_ranges(
    plans: Sequence[LayerPlan], timesteps: tuple[float, ...], *, groups: Sequence[int] | None, seed: int
) -> ActivationRanges:
    """A range for every quantized input, none like another.

    Ends are log-normal around -4 and 4. With rows, a range drifts over the steps as those of trained models
    do, with a slope and a little noise of its own; the text's does not.

    Args:
        plans: what is quantized.
        timesteps: rows of the step tables, in sampling order.
        groups: the group of every step; its steps have equal rows. None for a single row.
        seed: chooses everything.
    """
    source = _generator(seed)
    rows = 1 if groups is None else max(groups) + 1
    row_of_step = torch.tensor([0] if groups is None else list(groups))
    progress = torch.linspace(-1, 1, rows, dtype=torch.float64) if rows > 1 else torch.zeros(1).double()
    low, high = {}, {}
    for key in dict.fromkeys(key for plan in plans for key in activation_keys(plan)):
        ends = 4 * torch.exp(0.5 * torch.randn(2, generator=source, dtype=torch.float64))
        slope = 0.3 * torch.randn(1, generator=source, dtype=torch.float64)
        noise = 0.05 * torch.randn(rows, generator=source, dtype=torch.float64)
        drift = torch.ones(1).double() if key == _TEXT else torch.exp(slope * progress + noise)[row_of_step]
        low[key], high[key] = -ends[0] * drift, ends[1] * drift
    return ActivationRanges(low=low, high=high, timesteps=timesteps)


def random_widths(
    plans: Sequence[LayerPlan], denoiser: nn.Module, settings: BitAllocation, seed: int
) -> list[LayerPlan]:
    """Gives layers random widths of those that an allocation may choose, whose average is about its target.

    A target that is a share of bytes or time counts as that share of 8 bits. Protected layers keep their widths, and
    no layer is left in floating point.

    Args:
        plans: what the rules decided.
        denoiser: says how many weights a layer has.
        settings: the widths, the targets and what is protected.
        seed: chooses everything.
    """
    source = _generator(seed, 2)
    full = 1 if settings.objective == "average_bits" else _FULL_BITS
    kept = chosen_layers(settings.protect, plans, "bit_allocation.protect")
    free = [plan for plan in plans if plan.quantized and plan.name not in kept]
    weight: Mapping[str, int] = {}
    if settings.weight_target is not None:
        sizes = {plan.name: denoiser.get_parameter(f"{plan.name}.weight").numel() for plan in plans if plan.quantized}
        fixed = sum(sizes[plan.name] * plan.weight.bits for plan in plans if plan.name in kept and plan.weight)
        allowed = {"content": settings.content_weight_bits, "quality": settings.quality_weight_bits}
        widths = {plan.name: allowed[group_of([plan.name], settings.content)] for plan in free}
        budget = settings.weight_target * full * sum(sizes.values()) - fixed
        weight = _draw({plan.name: sizes[plan.name] for plan in free}, widths, budget, source)
    activation: Mapping[str, int] = {}
    if settings.activation_target is not None:
        shared = {plan.group for plan in plans if plan.name in kept}  # with a layer that keeps its width
        groups = dict.fromkeys((plan.group for plan in free if plan.group not in shared), 1)
        budget = settings.activation_target * full * len(groups)
        activation = _draw(groups, dict.fromkeys(groups, settings.activation_bits), budget, source)
    return [_with_widths(plan, weight.get(plan.name), activation.get(plan.group)) for plan in plans]


def _draw(
    sizes: Mapping[str, int], allowed: Mapping[str, tuple[int, ...]], budget: float, source: Generator
) -> dict[str, int]:
    """A random width for every name, so that the widths times the sizes sum up to about the budget.

    The largest come first. Each draws a width below and a width above the average that would spend the rest of the
    budget, and takes one of them with the odds that make this average its expectation: later ones even out what
    earlier ones drew.
    """
    rest, left = budget, float(sum(sizes.values()))
    drawn = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        needed, widths = rest / left, sorted(allowed[name])
        low = _pick([width for width in widths if width <= needed] or widths[:1], source)
        high = _pick([width for width in widths if width >= needed] or widths[-1:], source)
        share = (needed - low) / (high - low) if high > low else 0.0
        drawn[name] = high if float(torch.rand(1, generator=source)) < share else low
        rest -= sizes[name] * drawn[name]
        left -= sizes[name]
    return drawn


def _pick(widths: Sequence[int], source: Generator) -> int:
    return widths[int(torch.randint(len(widths), (1,), generator=source))]


def _with_widths(plan: LayerPlan, weight: int | None, activation: int | None) -> LayerPlan:
    if plan.weight is None or plan.activation is None or not plan.quantized:
        return plan
    return replace(
        plan,
        weight=plan.weight if weight is None else plan.weight.model_copy(update={"bits": weight}),
        activation=plan.activation if activation is None else plan.activation.model_copy(update={"bits": activation}),
    )


def _channel_ratios(
    loaded: LoadedModel, plans: Sequence[LayerPlan], settings: ChannelScale, seed: int
) -> dict[str, Tensor]:
    """Log-uniform factors from 1 to the largest that is allowed, by activation group."""
    source = _generator(seed, 3)
    ratios: dict[str, Tensor] = {}
    for plan in plans:
        if plan.channel_scale and plan.quantized and plan.group not in ratios:
            channels = loaded.denoiser.get_parameter(f"{plan.name}.weight").shape[1]
            ratio = settings.max_ratio ** torch.rand(channels, generator=source)
            ratios[plan.group] = cut_off(ratio, settings.max_ratio, power_of_two=settings.power_of_two)
    return ratios


def _softmax(
    loaded: LoadedModel, settings: SoftmaxQuant, groups: Sequence[int] | None, seed: int
) -> dict[str, SoftmaxParameters]:
    """Quantizers behind attention; adaptive ones are log2 in all rows, in none, or in about half of a block's rows."""
    source = _generator(seed, 4)
    rows = 1 if groups is None else max(groups) + 1
    row_of_step = torch.tensor([0] if groups is None else list(groups))
    parameters = {}
    for name in attention_names(loaded.denoiser, settings):
        share = float(torch.randint(3, (1,), generator=source)) / 2
        share = {"adaptive": share, "log2": 1.0, "uniform": 0.0}[settings.mode]
        mode = (torch.rand(rows, generator=source) < share).float()
        # a softmax over some tokens seldom reaches 1
        largest = 0.05 + 0.95 * torch.rand(rows, generator=source)
        scale = torch.where(mode == 1, 1.0, largest / (2**settings.bits - 1))
        if bool((mode == mode[0]).all()) and bool((scale == scale[0]).all()):
            parameters[name] = SoftmaxParameters(bits=settings.bits, scale=scale[:1], mode=mode[:1])
        else:
            parameters[name] = SoftmaxParameters(bits=settings.bits, scale=scale[row_of_step], mode=mode[row_of_step])
    return parameters


def _first_token(loaded: LoadedModel, plans: Sequence[LayerPlan], seed: int) -> Bos | None:
    """Normal numbers, one of them as large as in trained text encoders; None when no layer leaves the token out."""
    name = next((plan.name for plan in plans if plan.bos and plan.quantized), None)
    if name is None:
        return None
    source = _generator(seed, 5)
    width = loaded.denoiser.get_parameter(f"{name}.weight").shape[1]
    embedding = torch.randn(width, generator=source)
    embedding[int(torch.randint(width, (1,), generator=source))] = _BOS_OUTLIER
    return Bos(embedding=embedding)


def _generator(seed: int, mechanism: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed + 1_000_003 * mechanism)
