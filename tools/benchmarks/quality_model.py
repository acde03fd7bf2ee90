"""From a recipe to the fake-quant model that a row of the quality table measures, and its average widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from benchmarks.bos_outlier import load_any
from qdexport.core.target import target_named
from qdexport.models.denoiser import input_groups
from qdexport.pipeline.quantize import QuantizeSettings, make_quantized
from qdexport.quant.plan import macs_share

if TYPE_CHECKING:
    from pathlib import Path

    from qdexport.core.progress import ProgressSink
    from qdexport.core.recipe import Recipe
    from qdexport.core.spec import LayerPlan
    from qdexport.quant.attach import QuantizedModel

__all__ = ["Widths", "average_widths", "prepare"]

_TARGET = "tensorrt-rtx"  # whose capabilities a bit allocation may count with
_FP_BITS = 16.0  # what a layer in floating point counts with: the usual type of a deployed network


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """How wide a model's numbers are on average; a layer left in floating point counts with 16 bits.

    Attributes:
        weight_bits: over the weights of all Conv2d and Linear that stay in the network, by their number.
        activation_bits: over the values that those layers read, by their number; a tensor read by several
            layers counts once.
        macs_share: share of the multiply-accumulates done by quantized layers.
        quantized: how many layers are quantized.
        layers: how many stay in the network (not those that become a table of the timestep).
    """

    weight_bits: float
    activation_bits: float
    macs_share: float
    quantized: int
    layers: int


def prepare(
    model_name: str, recipe: Recipe, state_dir: Path | None, progress: ProgressSink, *, workers: int = 1
) -> QuantizedModel:
    """Loads a model and quantizes it as a recipe says.

    Args:
        model_name: as `load_model` takes it.
        recipe: the whole recipe.
        state_dir: where interrupted calibrations and sensitivities go on from.
        progress: told about them.
        workers: processes that measure sensitivities.

    Raises:
        QdExportError: the model or the recipe cannot be used.
    """
    settings = QuantizeSettings(target=target_named(_TARGET), folder=state_dir, workers=workers)
    return make_quantized(load_any(model_name), recipe, settings, progress)


def average_widths(model: QuantizedModel) -> Widths:
    """The average widths of a model's weights and activations, from its plans."""
    denoiser = model.loaded.denoiser
    present = [plan for plan in model.plans if not plan.folded and plan.macs > 0]
    weights = [(_weight_count(denoiser, plan), _bits(plan.weight)) for plan in present]
    shared, tensors = input_groups(denoiser), dict[str, tuple[float, float]]()
    for plan in present:
        name = plan.group or f"fp:{shared.get(plan.name, plan.name)}"
        tensors.setdefault(name, (_input_values(denoiser, plan), _bits(plan.activation)))
    return Widths(
        weight_bits=_mean(weights),
        activation_bits=_mean(list(tensors.values())),
        macs_share=macs_share(model.plans),
        quantized=sum(plan.quantized for plan in present),
        layers=len(present),
    )


def _bits(spec: object) -> float:
    return _FP_BITS if spec is None else float(spec.bits)  # type: ignore[attr-defined]  # a QuantSpec


def _weight_count(denoiser: nn.Module, plan: LayerPlan) -> float:
    return float(_layer(denoiser, plan).weight.numel())


def _input_values(denoiser: nn.Module, plan: LayerPlan) -> float:
    """Values that one call reads: multiply-accumulates over what each value takes part in."""
    layer = _layer(denoiser, plan)
    if isinstance(layer, nn.Linear):
        return plan.macs / layer.out_features
    kernel = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels / layer.groups
    return plan.macs * layer.stride[0] * layer.stride[1] / kernel


def _layer(denoiser: nn.Module, plan: LayerPlan) -> nn.Conv2d | nn.Linear:
    layer = denoiser.get_submodule(plan.name)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise TypeError(f"{plan.name} is a {type(layer).__name__}")
    return layer


def _mean(counts: list[tuple[float, float]]) -> float:
    total = sum(count for count, _ in counts)
    return sum(count * bits for count, bits in counts) / total if total else _FP_BITS
