"""Whether a network's numbers fit FP16: found out by one run in FP32, before anything long begins."""

from __future__ import annotations

import math
from typing import Final

import torch

from qdexport.check.calls import first_call
from qdexport.check.companions import exact_function
from qdexport.check.exact import exact_call
from qdexport.check.peaks import Peaks
from qdexport.core.precision import LARGEST
from qdexport.errors import ModelError
from qdexport.models.companions import Companion, example_companion_inputs
from qdexport.models.denoiser_io import io_spec
from qdexport.quant.attach import QuantizedModel
from qdexport.quant.modules import ActivationQuantizer

__all__ = ["check_denoiser_range", "why_not_half"]

_HALF: Final = LARGEST["fp16"]
_SIDE: Final = 32  # magnitudes do not depend on the size of a picture
_SEED: Final = 0


def check_denoiser_range(model: QuantizedModel) -> None:
    """Runs the first denoiser call of a sampling run in FP32, and reads what calibration saw.

    Raises:
        ModelError: the output of a module is not finite, or does not fit the FP16 body; the first such module is named.
    """
    peaks = Peaks(model.denoiser, model.body)
    inputs = first_call(model, io_spec(model.loaded, model.recipe.shapes, model.body))
    with peaks.magnitudes():
        exact_call(model.denoiser, inputs)
    name = peaks.not_finite()
    if name is not None:
        raise ModelError(
            f"the output of {name} holds NaN or infinity in the first denoiser call, in FP32: the weights of this "
            "layer, or of one before it, are damaged; load the model again from where it came from"
        )
    if model.body != "fp16":
        return
    beyond = peaks.first_beyond(_HALF)
    what = "the output"
    if beyond is None:
        beyond, what = _range_beyond(model), "the input"
    if beyond is not None:
        raise ModelError(
            f"{what} of {beyond[0]} reaches {beyond[1]:.3g}, beyond {_HALF:g}, the largest FP16 number: an FP16 body "
            "overflows there; compile with --body fp32 (`body: fp32` in the recipe)"
        )


def _range_beyond(model: QuantizedModel) -> tuple[str, float] | None:
    """The first quantized layer that calibration saw read more than FP16 holds."""
    for name, module in model.denoiser.named_modules():
        if isinstance(module, ActivationQuantizer) and module.spec.format == "int":
            spec, zero = module.spec, module.zero_point
            reach = torch.maximum((spec.qmin - zero).abs(), (spec.qmax - zero).abs()) * module.scale
            # the range of a symmetric quantizer may be a step wider than what was seen
            if float((reach - module.scale).max()) > _HALF:
                return name.rpartition(".input_quantizer")[0] or name, float(reach.max())
    return None


def why_not_half(companion: Companion, *, weights_alone: bool = False) -> str:
    """Why a network beside the denoiser cannot compute in FP16; empty when it can.

    Args:
        companion: the network with the weights that it was saved with, and facts of an FP32 body.
        weights_alone: do not run it.
    """
    for name, parameter in companion.network.named_parameters():
        largest = float(parameter.detach().abs().max()) if parameter.numel() else 0.0
        if not largest <= _HALF:
            return f"its weight {name} holds {largest:.3g}, beyond {_HALF:g}, the largest FP16 number"
    if weights_alone:
        return ""
    peaks = Peaks(companion.network, "fp32")
    inputs = example_companion_inputs(companion, _SEED)
    if "latents" in inputs:
        # what vae.decode takes is the sampler's latent, of deviation 1, divided by the factor
        inputs["latents"] = inputs["latents"][:1, :, :_SIDE, :_SIDE] / (companion.facts.scaling_factor or 1.0)
    with peaks.magnitudes():
        exact_function(companion)(inputs)
    beyond = peaks.first_beyond(_HALF)
    if beyond is None:
        return ""
    name, value = beyond
    if not math.isfinite(value):
        return f"the output of its {name} is not finite in FP32"
    return f"the output of its {name} reaches {value:.3g}, beyond {_HALF:g}, the largest FP16 number"
