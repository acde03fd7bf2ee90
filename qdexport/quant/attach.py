"""Puts quantizers into a denoiser: the layers that a plan names become their quantized twins."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qdexport.core.precision import Body
from qdexport.core.recipe import Recipe
from qdexport.core.spec import Granularity, LayerPlan, QuantSpec
from qdexport.errors import ModelError
from qdexport.models.denoiser_calls import FLUX_UNIT
from qdexport.models.denoiser_classes import FLUX, family_of
from qdexport.models.loaded import LoadedModel
from qdexport.models.torch_types import torch_dtype
from qdexport.quant.affine import parameters_from_range
from qdexport.quant.bos import Bos
from qdexport.quant.calibrate import schedule_timesteps
from qdexport.quant.modules import (
    ActivationQuantizer,
    ChannelScale,
    QuantConv2d,
    QuantLinear,
    QuantSplitConv2d,
    StepContext,
    StepRows,
    WeightQuantizer,
    install_step_rows,
    quantizer_pairs,
)
from qdexport.quant.plan import activation_keys, merge_weight_scales
from qdexport.quant.ranges import ActivationRanges
from qdexport.quant.search import weight_range
from qdexport.quant.softmax import SoftmaxParameters, SoftmaxQuantizer, install_softmax

__all__ = [
    "Body",
    "QuantParameters",
    "QuantizedModel",
    "attach",
    "install",
    "parameters_of",
    "quantize_model",
    "scales_by_layer",
    "shared_copy",
    "training_steps_of",
    "weight_scale",
]

logger = logging.getLogger(__name__)

_SMALLEST_HALF = 2.0**-24
_PLAIN_FORWARDS = (nn.Conv2d.forward, nn.Linear.forward)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantParameters:
    """All numbers of the quantizers of a model.

    Attributes:
        weight_scales: FP32 ``[1, C]``, ``[1, C, B]`` or ``[1]``, by part (a layer's name, or ``name#0``, ``name#1``
            when split).
        scales: FP32 activation scales ``[R]`` by activation key.
        zero_points: FP32, integer valued, ``[R]`` by activation key.
        timesteps: the calibrated timesteps in sampling order; row i of a table belongs to the i-th.
        channel_ratios: what the channels of an input are divided by, FP32 ``[C]``, by activation group.
        softmax: the quantizers behind attention, by attention block.
        bos: the text's first token, where layers leave it out.
    """

    weight_scales: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    zero_points: Mapping[str, Tensor]
    timesteps: tuple[float, ...] = ()
    channel_ratios: Mapping[str, Tensor] = field(default_factory=dict)
    softmax: Mapping[str, SoftmaxParameters] = field(default_factory=dict)
    bos: Bos | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """A fake-quant denoiser beside the floating-point model that it was made from.

    Attributes:
        loaded: the floating-point model, unchanged.
        denoiser: the fake-quant denoiser; it shares the weights of ``loaded.denoiser`` where the types agree.
        plans: the decision for every layer.
        recipe: what was asked for.
        body: floating-point type of ``denoiser``.
        timesteps: the calibrated timesteps in sampling order: the rows of step tables and of a time table. Of
            given ranges without timesteps those of the recipe's schedule; empty for a model without a
            scheduler.
        context: selects the rows of the step tables.
        bos: the text's first token, where layers leave it out.
        threads: the numbers of threads that calibrated it, in their order; empty where nothing was calibrated.
    """

    loaded: LoadedModel
    denoiser: nn.Module
    plans: tuple[LayerPlan, ...]
    recipe: Recipe
    body: Body
    timesteps: tuple[float, ...]
    context: StepContext
    bos: Bos | None = None
    threads: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the largest step table; 1 when all ranges are static."""
        return _most_rows(self.denoiser)


def quantize_model(
    loaded: LoadedModel, plans: Sequence[LayerPlan], recipe: Recipe, ranges: ActivationRanges
) -> QuantizedModel:
    """Makes the fake-quant model; ``loaded`` stays as it is.

    Args:
        loaded: the floating-point model.
        plans: what is quantized how.
        recipe: asks for the body's type.
        ranges: of every quantized layer's input.

    Raises:
        ModelError: a range is missing, or a weight does not fit the body's type.
    """
    without = next((plan.name for plan in plans if plan.bos and plan.quantized and ranges.bos is None), None)
    if without is not None:
        raise ModelError(
            f"layer {without} leaves the text's first token out, whose embedding the ranges lack; calibrate again, or "
            "set `bos: off`"
        )
    body = _body_of(loaded, recipe)
    if recipe.allow_re_rounding:
        plans = merge_weight_scales(loaded.denoiser, plans)
    denoiser = shared_copy(loaded.denoiser, None if loaded.weights_dtype == body else torch_dtype(body))
    context = attach(denoiser, plans, ranges, training_steps_of(loaded))
    return QuantizedModel(
        loaded=loaded,
        denoiser=denoiser,
        plans=tuple(plans),
        recipe=recipe,
        body=body,
        timesteps=_timesteps(loaded, recipe, ranges),
        context=context,
        bos=ranges.bos,
    )


def attach(
    denoiser: nn.Module, plans: Sequence[LayerPlan], ranges: ActivationRanges, training_steps: int
) -> StepContext:
    """Quantizes the planned layers of ``denoiser`` in place, with parameters from ranges.

    Args:
        denoiser: weights in the body's type; temporaries are of one layer at a time.
        plans: what is quantized how.
        ranges: of every quantized layer's input.
        training_steps: number of training timesteps of the scheduler.

    Returns:
        The context that selects rows, for those who call parts of the denoiser.

    Raises:
        ModelError: a range is missing, a weight is not finite, or a layer cannot be replaced.
    """
    return install(denoiser, plans, parameters_of(denoiser, plans, ranges), training_steps)


def parameters_of(denoiser: nn.Module, plans: Sequence[LayerPlan], ranges: ActivationRanges) -> QuantParameters:
    """Scales and zero points of all planned layers.

    A step table whose rows are all equal (a text input, for instance) shrinks to one static row.

    Raises:
        ModelError: a range is missing or unusable, or a weight is not finite.
    """
    ranges.check(plans)
    weight_scales: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    zero_points: dict[str, Tensor] = {}
    for plan in plans:
        if plan.weight is None or not plan.quantizes_weight:
            continue
        weight = _layer(denoiser, plan).weight
        if plan.channel_scale:
            with torch.no_grad():
                weight = _channel_scale(_layer(denoiser, plan), plan, ranges.channel_ratios[plan.group]).weight(weight)
        kernels = torch.split_with_sizes(weight, plan.splits, dim=1) if plan.splits else (weight,)
        for part, kernel in zip(plan.parts, kernels, strict=True):
            weight_scales[part] = _weight_scale(part, kernel, plan.weight)
        for key in activation_keys(plan):
            if plan.activation is None:
                continue
            scale, zero_point = parameters_from_range(ranges.low[key], ranges.high[key], plan.activation)
            if bool((scale == scale[0]).all()) and bool((zero_point == zero_point[0]).all()):
                scale, zero_point = scale[:1], zero_point[:1]
            scales[key], zero_points[key] = scale, zero_point
    return QuantParameters(
        weight_scales=_grouped(plans, weight_scales),
        scales=scales,
        zero_points=zero_points,
        timesteps=ranges.timesteps,
        channel_ratios=ranges.channel_ratios,
        softmax=ranges.softmax,
        bos=ranges.bos,
    )


def _grouped(plans: Sequence[LayerPlan], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers of one block, input and width get the largest of their scales, where their plans say so.

    Keys and values of the text stay apart from those of other blocks: one product of them all would have to be cut into
    pieces, a copy each.
    """
    members: dict[tuple[str, str, int], list[str]] = {}
    for plan in plans:
        if plan.weight is not None and plan.quantized and plan.weight.granularity is Granularity.PER_GROUP:
            block = plan.name.rpartition(".")[0]
            members.setdefault((block, plan.group, plan.weight.bits), []).extend(plan.parts)
    merged = dict(scales)
    for parts in members.values():
        largest = torch.stack([scales[part] for part in parts]).amax(dim=0)
        merged |= dict.fromkeys(parts, largest)
    return merged


def weight_scale(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The FP32 scale of one weight: ``[1, C]`` per output channel, ``[1, C, B]`` per block, else ``[1]``.

    Scales of blocks are FP16 numbers: a builder multiplies INT4 by them without a kernel of its own only when they are,
    and a product with a code of up to 8 bits is exact in FP32, so that every form of the product has equal weights.

    Raises:
        ValueError: the weight holds NaN or infinity, or the observer is none for weights.
    """
    scale, _ = parameters_from_range(*weight_range(weight, spec), spec)
    if spec.granularity is Granularity.PER_BLOCK:
        half = scale.clamp(min=_SMALLEST_HALF, max=torch.finfo(torch.float16).max).half().float()
        return half.reshape(1, weight.shape[0], -1)
    return scale[None] if spec.granularity is Granularity.PER_CHANNEL else scale


def install(
    denoiser: nn.Module, plans: Sequence[LayerPlan], parameters: QuantParameters, training_steps: int
) -> StepContext:
    """Replaces the planned layers in place by quantized ones with the given parameters.

    Layers of one activation group share one quantizer object. Arguments and result as :func:`attach`.

    Raises:
        ModelError: a layer's class has a forward of its own, which a replacement would lose.
    """
    context = StepContext()
    quantizers: dict[str, ActivationQuantizer] = {}
    for plan in plans:
        if plan.weight is None or not plan.quantizes_weight:
            continue
        layer = _layer(denoiser, plan)
        inputs: list[ActivationQuantizer] = []
        for key in activation_keys(plan):
            if key not in quantizers and plan.activation is not None:
                quantizer = ActivationQuantizer(
                    plan.activation, parameters.scales[key], parameters.zero_points[key], context
                )
                quantizers[key] = quantizer.to(layer.weight.device)
            inputs.append(quantizers[key])
        weights = [
            WeightQuantizer(plan.weight, parameters.weight_scales[part]).to(layer.weight.device) for part in plan.parts
        ]
        scale = None
        if plan.channel_scale:
            scale = _channel_scale(layer, plan, parameters.channel_ratios[plan.group])
        _replace(denoiser, plan.name, _wrapped(layer, plan, (inputs, weights), scale))
    install_softmax(denoiser, parameters.softmax, context)
    if _most_rows(denoiser) > 1:
        unit = FLUX_UNIT if family_of(denoiser) == FLUX else 1.0
        rows = StepRows(parameters.timesteps, training_steps, context, unit)
        install_step_rows(denoiser, rows.to(next(denoiser.parameters()).device))
    return context


def scales_by_layer(model: QuantizedModel) -> dict[str, list[float]]:
    """Activation scales of every quantized layer or part of a split layer, one number per row."""
    scales: dict[str, list[float]] = {}
    for plan in model.plans:
        if plan.quantized:
            pairs = quantizer_pairs(model.denoiser.get_submodule(plan.name))
            scales |= {
                part: inputs.scale.tolist()
                for part, (inputs, _) in zip(plan.parts, pairs, strict=True)
                if inputs is not None
            }
    return scales


def shared_copy(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the module tree over the same parameters and buffers: layers can be replaced without touching
    the original.

    Args:
        module: any module.
        dtype: floating-point parameters and buffers are copied to this type instead of shared.

    Raises:
        ModelError: a finite weight becomes infinite in ``dtype``.
    """
    memo: dict[int, Any] = {}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        memo[id(tensor)] = tensor if dtype is None else _converted(name, tensor, dtype)
    return copy.deepcopy(module, memo)


def training_steps_of(loaded: LoadedModel) -> int:
    """Number of training timesteps of the model's scheduler; 1000 for a denoiser without one."""
    return int(loaded.scheduler.config.num_train_timesteps) if loaded.scheduler is not None else 1000


def _timesteps(loaded: LoadedModel, recipe: Recipe, ranges: ActivationRanges) -> tuple[float, ...]:
    """Those of the ranges; static ranges from elsewhere name none, then those the calibration would have."""
    if ranges.timesteps or loaded.scheduler is None:
        return ranges.timesteps
    return schedule_timesteps(loaded, recipe.calibration)


def _body_of(loaded: LoadedModel, recipe: Recipe) -> Body:
    if recipe.body != "auto":
        return recipe.body
    return "fp32" if loaded.weights_dtype == "fp32" else "fp16"


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.detach().to(dtype)
    lost = torch.isfinite(tensor) & ~torch.isfinite(converted)
    if bool(lost.any()):
        value = float(tensor.detach()[lost].abs().max())
        raise ModelError(
            f"{name} holds {value:g}, beyond the largest {str(dtype).removeprefix('torch.')} number "
            f"{torch.finfo(dtype).max:g}; set `body: fp32` in the recipe"
        )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(converted, requires_grad=tensor.requires_grad)
    return converted


def _channel_scale(layer: nn.Conv2d | nn.Linear, plan: LayerPlan, ratio: Tensor) -> ChannelScale:
    if ratio.shape != layer.weight.shape[1:2]:
        raise ModelError(
            f"the channel ratios of {plan.group} have shape {list(ratio.shape)}, and layer {plan.name} has "
            f"{layer.weight.shape[1]} input channels; quantize the model again"
        )
    return ChannelScale(ratio, plan.kind).to(layer.weight.device)


def _weight_scale(part: str, weight: Tensor, spec: QuantSpec) -> Tensor:
    try:
        return weight_scale(weight, spec)
    except ValueError as error:
        raise ModelError(f"the weight of {part} cannot be quantized: {error}") from error


def _layer(denoiser: nn.Module, plan: LayerPlan) -> nn.Conv2d | nn.Linear:
    try:
        layer = denoiser.get_submodule(plan.name)
    except AttributeError as error:
        raise ModelError(f"the denoiser has no layer {plan.name}; the plan is of another model") from error
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise ModelError(f"layer {plan.name} is a {type(layer).__name__}, not a Conv2d or Linear; plan it again")
    if isinstance(layer, QuantConv2d | QuantLinear | QuantSplitConv2d):
        raise ModelError(f"layer {plan.name} is quantized already; load the floating-point model")
    if type(layer).forward not in _PLAIN_FORWARDS:
        raise ModelError(
            f"layer {plan.name} is a {type(layer).__name__} with a forward of its own, which quantizing "
            "would replace; leave it in floating point by a rule without quantizers"
        )
    return layer


def _most_rows(denoiser: nn.Module) -> int:
    quantizers = (item for item in denoiser.modules() if isinstance(item, ActivationQuantizer | SoftmaxQuantizer))
    return max((item.scale.shape[0] for item in quantizers), default=1)


def _wrapped(
    layer: nn.Conv2d | nn.Linear,
    plan: LayerPlan,
    quantizers: tuple[list[ActivationQuantizer], list[WeightQuantizer]],
    channel_scale: ChannelScale | None,
) -> nn.Module:
    inputs, weights = quantizers
    first = inputs[0] if inputs else None
    if isinstance(layer, nn.Linear):
        if plan.splits:
            raise ModelError(f"layer {plan.name} is a Linear; only a convolution can be split")
        return QuantLinear.wrap(layer, first, weights[0], channel_scale, bos=plan.bos)
    if plan.splits:
        return QuantSplitConv2d.wrap(layer, plan.splits, inputs, weights, channel_scale)
    return QuantConv2d.wrap(layer, first, weights[0], channel_scale)


def _replace(root: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    owner = root.get_submodule(parent) if parent else root
    setattr(owner, attribute, layer)
