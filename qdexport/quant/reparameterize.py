"""Chooses the channel scales of a model: TCAQ-DM's joint ratio, cut off where a layer's own output errs least."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qdexport.core.recipe import ChannelScale as ChannelScaleSettings
from qdexport.core.recipe import Recipe
from qdexport.core.spec import LayerPlan, QuantSpec
from qdexport.models.loaded import LoadedModel
from qdexport.models.sampling import OnProgress, SampleRequest, sample
from qdexport.quant.affine import parameters_from_range
from qdexport.quant.attach import weight_scale
from qdexport.quant.calibrate import Observations, calibration_prompts
from qdexport.quant.channel_scale import cut_off, cut_offs, grouped_peaks, joint_ratio
from qdexport.quant.groups import uniform_groups
from qdexport.quant.modules import (
    ActivationQuantizer,
    ChannelScale,
    QuantConv2d,
    QuantLinear,
    QuantSplitConv2d,
    WeightQuantizer,
)
from qdexport.quant.search import activation_range_of_least_error

__all__ = ["choose_ratios"]

logger = logging.getLogger(__name__)

_PROMPTS = 8
_STEPS = 5  # of the schedule on which cut-offs are compared
_VALUES = 4096


def choose_ratios(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    observations: Observations,
    on_progress: OnProgress | None = None,
) -> dict[str, Tensor]:
    """``r`` for every activation group that the recipe scales.

    The joint ratio comes from the observed channels, over uniform groups of steps. Where it is cut off decides how much
    of an input's spread goes into the weight; methods.md 4.4 says to tune it. With ``choose_ratio`` each group takes
    the cut-off (1 included: no change) with the least squared error of its layers' outputs, both operands quantized,
    at five steps of a short sampling run.

    Args:
        loaded: the floating-point model.
        plans: with the widths that the error is measured at.
        recipe: the settings.
        observations: with ranges of channels.
        on_progress: called after each denoiser call with the calls done and their total.

    Returns:
        FP32 ``[C]`` by activation group.
    """
    settings = recipe.channel_scale
    if settings is None:
        return {}
    groups = uniform_groups(len(observations.timesteps), settings.groups)
    full = {
        group: joint_ratio(grouped_peaks(observer.peaks, groups)) for group, observer in observations.channels.items()
    }
    limits = dict.fromkeys(full, settings.max_ratio)
    if settings.choose_ratio:
        limits = _best_limits(loaded, plans, recipe, full, on_progress)
    return {group: cut_off(ratio, limits[group], power_of_two=settings.power_of_two) for group, ratio in full.items()}


def _best_limits(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    ratios: Mapping[str, Tensor],
    on_progress: OnProgress | None,
) -> dict[str, float]:
    settings = recipe.channel_scale
    if settings is None:
        return {}
    errors: dict[str, dict[float, float]] = {group: {} for group in ratios}
    trials = [
        _Trial(plan, settings, ratios[plan.group], errors[plan.group])
        for plan in plans
        if plan.quantized and plan.channel_scale
    ]
    calibration = recipe.calibration
    few = calibration.model_copy(update={"prompts": min(_PROMPTS, calibration.prompts)})
    guidance = calibration.guidance_scale
    request = SampleRequest(
        prompts=tuple(calibration_prompts(loaded, few)),
        seed=calibration.seed,
        steps=calibration.steps or loaded.defaults.steps,
        guidance_scale=loaded.defaults.guidance_scale if guidance is None else guidance,
        batch_size=few.prompts,
    )
    steps = request.steps or 1
    chosen = {round(index * (steps - 1) / max(_STEPS - 1, 1)) for index in range(_STEPS)}
    layers = [loaded.denoiser.get_submodule(trial.plan.name) for trial in trials]
    hooks = [layer.register_forward_hook(trial) for layer, trial in zip(layers, trials, strict=True)]

    def at(step: int, timestep: float, inputs: dict[str, Tensor]) -> None:
        del timestep, inputs
        for trial in trials:
            trial.active = step in chosen

    try:
        sample(loaded, request, on_call=at, on_progress=on_progress)
    finally:
        for hook in hooks:
            hook.remove()
    return {group: min(found, key=lambda limit: (found[limit], limit)) for group, found in errors.items()}


class _Trial:
    """A forward hook that quantizes its layer with every cut-off and adds up the errors of the output."""

    def __init__(
        self, plan: LayerPlan, settings: ChannelScaleSettings, ratio: Tensor, errors: dict[float, float]
    ) -> None:
        self.plan = plan
        self.active = False
        self._ratios = {
            limit: cut_off(ratio, limit, power_of_two=settings.power_of_two)
            for limit in cut_offs(min(settings.max_ratio, float(ratio.max())), 2.0 if settings.power_of_two else 1.5)
        }
        self._errors = errors
        self._generator = torch.Generator().manual_seed(0)
        self._kernels: dict[float, list[Tensor]] = {}

    @torch.no_grad()
    def __call__(self, layer: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
        if not self.active:
            return
        x = args[0]
        reference = y[:, 1:] if self.plan.bos else y
        energy = float(reference.double().square().sum()) or 1.0
        for limit, ratio in self._ratios.items():
            found = self._output(layer, x, limit, ratio)
            error = float((found[:, 1:] if self.plan.bos else found).sub_(reference).double().square().sum()) / energy
            self._errors[limit] = self._errors.get(limit, 0.0) + error

    def _output(self, layer: nn.Module, x: Tensor, limit: float, ratio: Tensor) -> Tensor:
        scale = ChannelScale(ratio.to(x.device), self.plan.kind)
        operand = scale(x[:, 1:] if self.plan.bos else x)
        inputs = [self._quantizer(part) for part in self._parts(operand)]
        spec = self.plan.weight
        if spec is None:
            raise ValueError(f"{self.plan.name} has no weight quantizer")
        if limit not in self._kernels:
            weight = scale.weight(layer.get_parameter("weight"))
            self._kernels[limit] = [weight_scale(part, spec) for part in self._parts(weight)]
        weights = [WeightQuantizer(spec, found) for found in self._kernels[limit]]
        # not called: a twin shares its layer's hooks, this one among them
        y: Tensor = _wrap(layer, self.plan, inputs, weights, scale).forward(x)
        return y

    def _parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return torch.split_with_sizes(tensor, self.plan.splits, dim=1) if self.plan.splits else (tensor,)

    def _quantizer(self, operand: Tensor) -> ActivationQuantizer:
        spec = self.plan.activation
        if spec is None:
            raise ValueError(f"{self.plan.name} has no activation quantizer")
        low, high = (float(end) for end in torch.aminmax(operand))
        if spec.observer.kind != "minmax":
            index = torch.randint(operand.numel(), (_VALUES,), generator=self._generator)
            values = operand.reshape(-1)[index.to(operand.device)].float().cpu()
            low, high = activation_range_of_least_error(values, low, high, _least_squares(spec))
        scale, zero = parameters_from_range(torch.tensor([low]), torch.tensor([high]), spec)
        return ActivationQuantizer(spec, scale, zero)


def _least_squares(spec: QuantSpec) -> QuantSpec:
    """The quantizer with the search of least squared error, which this comparison is about."""
    return spec.model_copy(update={"observer": spec.observer.model_copy(update={"kind": "mse", "exponent": 2.0})})


def _wrap(
    layer: Any, plan: LayerPlan, inputs: list[ActivationQuantizer], weights: list[WeightQuantizer], scale: ChannelScale
) -> nn.Module:
    if plan.kind == "linear":
        return QuantLinear.wrap(layer, inputs[0], weights[0], scale, bos=plan.bos)
    if plan.splits:
        return QuantSplitConv2d.wrap(layer, plan.splits, inputs, weights, scale)
    return QuantConv2d.wrap(layer, inputs[0], weights[0], scale)
