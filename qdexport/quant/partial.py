"""Denoisers in which only some layers are quantized, and of those only the weights or only the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from qdexport.core.spec import LayerPlan
from qdexport.quant.attach import install, parameters_of, shared_copy
from qdexport.quant.bos import Bos
from qdexport.quant.modules import QuantSplitConv2d
from qdexport.quant.plan import activation_keys
from qdexport.quant.ranges import ActivationRanges

__all__ = [
    "Ends",
    "QuantizedParts",
    "RangeSource",
    "ScaledRanges",
    "partly_quantized",
    "plain_ends",
    "ranges_from",
    "unused_ranges",
    "with_bits",
]

Ends = Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]
QuantizedParts = Literal["weight", "activation", "both"]


class RangeSource(Protocol):
    """What gives activation ranges for any widths from the same statistics (``calibrate.Observations``)."""

    def ranges(self, plans: Sequence[LayerPlan]) -> ActivationRanges:
        """The ranges of the planned quantizers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledRanges:
    """Ranges that were observed behind channel scales, together with these scales.

    Attributes:
        observations: ranges for any widths.
        channel_ratios: what the channels of an input are divided by, by activation group.
    """

    observations: RangeSource
    channel_ratios: Mapping[str, Tensor]

    def ranges(self, plans: Sequence[LayerPlan]) -> ActivationRanges:
        """The ranges of the planned quantizers."""
        return replace(self.observations.ranges(plans), channel_ratios=dict(self.channel_ratios))


def plain_ends(ranges: ActivationRanges) -> Ends:
    """Lows and highs as numbers, for what is sent to other processes."""
    return {key: (tuple(ranges.low[key].tolist()), tuple(ranges.high[key].tolist())) for key in sorted(ranges.low)}


def ranges_from(ends: Ends, ratios: Mapping[str, Sequence[float]], timesteps: Sequence[float]) -> ActivationRanges:
    """The ranges that :func:`plain_ends` was made from; ``ratios`` are of channels, by activation group."""
    return ActivationRanges(
        low={key: torch.tensor(low, dtype=torch.float64) for key, (low, _) in ends.items()},
        high={key: torch.tensor(high, dtype=torch.float64) for key, (_, high) in ends.items()},
        timesteps=tuple(timesteps),
        channel_ratios={group: torch.tensor(ratio) for group, ratio in ratios.items()},
    )


def unused_ranges(plans: Sequence[LayerPlan], observations: RangeSource) -> ActivationRanges:
    """Ranges for layers whose inputs stay in floating point: the same whatever was observed, but for channel scales.

    What was observed must not decide whether a measurement of weights is found again.
    """
    keys = [key for plan in plans for key in activation_keys(plan)]
    unit = torch.ones(1, dtype=torch.float64)
    ranges = ActivationRanges(low=dict.fromkeys(keys, -unit), high=dict.fromkeys(keys, unit))
    if any(plan.channel_scale and plan.quantized for plan in plans):
        ranges = replace(ranges, channel_ratios=observations.ranges(plans).channel_ratios)
    return ranges


class _KeepWeight(nn.Module):
    """In the place of a weight's quantizer: the weight as it is."""

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return weight if dtype is None else weight.to(dtype)


def with_bits(plan: LayerPlan, *, weight: int | None = None, activation: int | None = None) -> LayerPlan:
    """A quantized layer's plan with other widths; None keeps a width. Everything else stays, ranges come anew."""
    if plan.weight is None or plan.activation is None:
        return plan
    return replace(
        plan,
        weight=plan.weight if weight is None else plan.weight.model_copy(update={"bits": weight}),
        activation=plan.activation if activation is None else plan.activation.model_copy(update={"bits": activation}),
    )


def partly_quantized(
    denoiser: nn.Module,
    plans: Iterable[LayerPlan],
    ranges: ActivationRanges,
    parts: QuantizedParts,
    training_steps: int,
) -> nn.Module:
    """A copy of a floating-point denoiser, over the same weights, in which the planned layers are quantized.

    They are made as in the final model (split shortcuts, first tokens that bypass the quantizers, channel scales,
    scales of the planned widths); then the quantizers of what stays in floating point are taken out.

    Args:
        denoiser: in floating point; left as it is.
        plans: layers to quantize.
        ranges: of their inputs; with ``parts`` "weight" they are not used, but must be there.
        parts: what is quantized.
        training_steps: of the scheduler.

    Raises:
        ModelError: a range is missing, or a layer cannot be replaced.
    """
    chosen = [plan for plan in plans if plan.quantized]
    copy = shared_copy(denoiser)
    # the first token is computed from the denoiser's own input here; its embedding matters to compiled graphs only
    ranges = replace(ranges, softmax={}, bos=ranges.bos or Bos(embedding=torch.zeros(0)))
    install(copy, chosen, parameters_of(copy, chosen, ranges), training_steps)
    for plan in chosen:
        layer = copy.get_submodule(plan.name)
        if parts == "weight":
            _take_out(layer, "input_quantizer", nn.Identity)
        elif parts == "activation":
            _take_out(layer, "weight_quantizer", _KeepWeight)
    return copy


def _take_out(layer: nn.Module, attribute: str, stand_in: type[nn.Module]) -> None:
    if isinstance(layer, QuantSplitConv2d):
        setattr(layer, f"{attribute}s", nn.ModuleList(stand_in() for _ in layer.splits))
    else:
        setattr(layer, attribute, stand_in())
