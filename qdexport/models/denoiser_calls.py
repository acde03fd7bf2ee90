"""Calls of diffusers denoisers by the names of the exported network's inputs, and back.

The timestep of an exported network is the scheduler's, [1] for all rows, whatever the denoiser's own code wants: FLUX's
is called with a thousandth of it, PixArt's with one per row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from qdexport.core.io_spec import IoSpec
from qdexport.errors import ModelError
from qdexport.models.denoiser_classes import DIT, FLUX, PIXART, SD3, config_of, family_of

__all__ = ["DOWN_RESIDUAL", "FLUX_UNIT", "MID_RESIDUAL", "call_denoiser", "example_inputs", "named_inputs"]

DOWN_RESIDUAL: Final = "down_block_res_"  # and a number from 0 on
MID_RESIDUAL: Final = "mid_block_res"
FLUX_UNIT: Final = 1000.0  # FLUX multiplies the timestep that it is called with
_ADDED: Final = ("text_embeds", "time_ids", "resolution", "aspect_ratio")  # diffusers groups these in a dictionary
_PLAIN: Final[dict[str, tuple[str, ...]]] = {
    "UNet2DConditionModel": ("encoder_hidden_states", "class_labels", "text_embeds", "time_ids"),
    "UNet2DModel": ("class_labels",),
    DIT: ("class_labels",),
    PIXART: ("encoder_hidden_states", "encoder_attention_mask", "resolution", "aspect_ratio"),
    SD3: ("encoder_hidden_states", "pooled_projections"),
    FLUX: ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids", "guidance"),
}
_POSITIONS: Final = 64  # of example inputs


def call_denoiser(denoiser: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
    """Calls a diffusers denoiser with the named inputs of the exported network.

    Args:
        denoiser: Anything with the call signature of a diffusers denoiser.
        inputs: `sample` [N, C, H, W] (FLUX: [N, tokens, C]), `timestep` [1], and the model's others.

    Returns:
        The prediction, as large as the sample.
    """
    plain = [name for name in inputs if name not in ("sample", "timestep", *_ADDED, MID_RESIDUAL)]
    others: dict[str, Any] = {name: inputs[name] for name in plain if not name.startswith(DOWN_RESIDUAL)}
    added = {name: inputs[name] for name in _ADDED if name in inputs}
    if added:
        others["added_cond_kwargs"] = added
    if MID_RESIDUAL in inputs:
        count = sum(name.startswith(DOWN_RESIDUAL) for name in inputs)
        others["down_block_additional_residuals"] = tuple(
            inputs[f"{DOWN_RESIDUAL}{index}"] for index in range(count)
        )
        others["mid_block_additional_residual"] = inputs[MID_RESIDUAL]
    timestep = inputs["timestep"]
    if "img_ids" in inputs:
        timestep = timestep / FLUX_UNIT
    if "encoder_attention_mask" in inputs:  # PixArt reshapes what it makes of the timestep to one row per sample
        timestep = timestep.expand(inputs["sample"].shape[0])
    output: tuple[Tensor, ...] = denoiser(inputs["sample"], timestep=timestep, **others, return_dict=False)
    return output[0]


def named_inputs(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turns the arguments of a diffusers call into the named inputs of the exported network.

    Args:
        denoiser: The denoiser whose forward signature the arguments follow.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The tensors as passed, without copies; `timestep` [1], int64, or float32 where it is a fraction or the family's
        timesteps are; position ids as int64.

    Raises:
        ModelError: The call passes something that no exported network has an input for (a mask of the sample, an image
            of an adapter), mixes timesteps, or has position ids that are no whole numbers.
    """
    family = family_of(denoiser)
    signature = inspect.signature(type(denoiser).forward)
    bound = signature.bind(denoiser, *args, **kwargs).arguments
    values = {name: value for name, value in list(bound.items())[1:] if value is not None}
    values.pop("return_dict", None)
    first = list(signature.parameters)[1]  # sample, or hidden_states
    inputs: dict[str, Tensor] = {
        "sample": values.pop(first),
        "timestep": _timestep(values.pop("timestep"), family),
    }
    known = _known_names(denoiser, family)
    inputs.update({name: values.pop(name) for name in known if name in values})
    added = values.pop("added_cond_kwargs", {})
    inputs.update({name: value for name, value in added.items() if value is not None})
    inputs.update(_residuals(values))
    foreign = sorted(_foreign(inputs, known) | {name for name in values if values[name] != {}})
    if foreign:
        raise ModelError(
            f"the pipeline passes {', '.join(foreign)} to the denoiser, no input of the exported network: "
            "use a plain text-to-image, class-conditional or unconditional pipeline"
        )
    return {name: _whole(name, tensor) if name.endswith("_ids") else tensor for name, tensor in inputs.items()}


def example_inputs(
    io: IoSpec, seed: int, device: torch.device | str = "cpu", *, train_timesteps: int = 1000
) -> dict[str, Tensor]:
    """Random inputs at the best sizes: normal floats, a timestep inside the training range, legal labels and positions.

    Args:
        io: The network's inputs.
        seed: Equal seeds give equal numbers, up to rounding to the input's type.
        device: Where the tensors go; they are drawn on the CPU.
        train_timesteps: Length of the training schedule.
    """
    source = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for spec in io.inputs:
        shape, dtype = spec.shape(), getattr(torch, spec.dtype)
        if spec.role == "timestep":
            # from 1: a network with Fourier time features divides by the timestep
            tensor = torch.randint(1, train_timesteps, shape, generator=source)
        elif spec.role == "time_ids":
            tensor = torch.randint(0, 129, shape, generator=source) * 8  # image sizes in pixels
        elif spec.role == "position_ids":
            tensor = torch.randint(0, _POSITIONS, shape, generator=source)
        elif spec.role == "text_mask":
            kept = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=source)
            tensor = torch.arange(shape[1]) < kept
        elif spec.role == "class_labels" and not dtype.is_floating_point:
            tensor = torch.randint(0, 2, shape, generator=source)  # every model has two classes at least
        elif spec.role == "guidance" and len(shape) == 1:
            tensor = 1 + 4 * torch.rand(shape, generator=source)
        else:
            tensor = torch.randn(shape, generator=source)
        inputs[spec.name] = tensor.to(device=device, dtype=dtype)
    return inputs


def _known_names(denoiser: nn.Module, family: str) -> tuple[str, ...]:
    names = _PLAIN.get(family, ())
    if family == "UNet2DConditionModel" and config_of(denoiser).get("time_cond_proj_dim") is not None:
        names = (*names, "timestep_cond")
    return names


def _residuals(values: dict[str, Any]) -> dict[str, Tensor]:
    """A ControlNet's residuals by name; they leave ``values``."""
    if "mid_block_additional_residual" not in values or "down_block_additional_residuals" not in values:
        return {}
    down = values.pop("down_block_additional_residuals")
    named = {f"{DOWN_RESIDUAL}{index}": tensor for index, tensor in enumerate(down)}
    return {**named, MID_RESIDUAL: values.pop("mid_block_additional_residual")}


def _foreign(inputs: Mapping[str, Tensor], known: tuple[str, ...]) -> set[str]:
    allowed = {"sample", "timestep", *known, MID_RESIDUAL}
    return {name for name in inputs if name not in allowed and not name.startswith(DOWN_RESIDUAL)}


def _timestep(value: Any, family: str) -> Tensor:
    steps = torch.as_tensor(value).detach().reshape(-1)
    first = steps[:1]
    if bool((steps != first).any()):
        raise ModelError(f"one denoiser call mixes the timesteps {steps.tolist()}; sample with one per call")
    if family == FLUX:
        return (first.double() * FLUX_UNIT).float()
    whole = first.to(torch.int64)
    if family == SD3 or bool((whole != first).any()):
        return first.float()
    return whole


def _whole(name: str, tensor: Tensor) -> Tensor:
    """Position ids as the exported network has them; those of a batch are the same for all rows."""
    if name == "time_ids":
        return tensor
    tensor = tensor[0] if tensor.dim() == 3 else tensor
    whole = tensor.to(torch.int64)
    if bool((whole != tensor).any()):
        raise ModelError(f"{name} holds positions that are no whole numbers; the exported network has a table of those")
    return whole
