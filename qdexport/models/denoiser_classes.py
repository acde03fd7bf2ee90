"""Which denoisers qdexport compiles, and what tells their families apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from qdexport.errors import ModelError

__all__ = [
    "DIT",
    "FLUX",
    "PIXART",
    "SD3",
    "TRANSFORMERS",
    "UNETS",
    "check_denoiser",
    "config_of",
    "denoiser_class",
    "family_of",
]

UNETS: Final = ("UNet2DConditionModel", "UNet2DModel")
DIT: Final = "DiTTransformer2DModel"
PIXART: Final = "PixArtTransformer2DModel"
SD3: Final = "SD3Transformer2DModel"
FLUX: Final = "FluxTransformer2DModel"
TRANSFORMERS: Final = (DIT, PIXART, SD3, FLUX)


def denoiser_class(name: str) -> type[nn.Module]:
    """The diffusers class of a denoiser, by the `_class_name` of its config.

    Raises:
        ModelError: qdexport does not compile this class.
    """
    import diffusers

    supported = (*UNETS, *TRANSFORMERS)
    if name not in supported:
        raise ModelError(
            f"{name!r} is not a denoiser that qdexport compiles; supported: {', '.join(supported)}"
        )
    cls: type[nn.Module] = getattr(diffusers, name)
    return cls


def family_of(denoiser: nn.Module) -> str:
    """The name of the diffusers class that a denoiser is, also of one whose layers were replaced."""
    for cls in type(denoiser).__mro__:
        if cls.__name__ in UNETS or cls.__name__ in TRANSFORMERS:
            return cls.__name__
    return type(denoiser).__name__


def config_of(denoiser: nn.Module) -> Mapping[str, Any]:
    """The diffusers configuration of a denoiser.

    Raises:
        ModelError: it has none.
    """
    config = getattr(denoiser, "config", None)
    if not isinstance(config, Mapping):
        raise ModelError(f"{type(denoiser).__name__} has no diffusers config; pass a diffusers denoiser")
    return config


def check_denoiser(config: Mapping[str, Any]) -> None:
    """Refuses denoisers that need inputs which the exported network does not have.

    Args:
        config: A denoiser's configuration.

    Raises:
        ModelError: Says which config entry, with its value.
    """
    allowed: dict[str, tuple[Any, ...]] = {
        "addition_embed_type": (None, "text", "text_time"),
        "encoder_hid_dim_type": (None, "text_proj"),
        "attention_type": (None, "default"),
    }
    if config.get("_class_name") == FLUX:
        allowed["patch_size"] = (None, 1)  # its pipelines pack 2 x 2 latents themselves
    for key, values in allowed.items():
        value = config.get(key)
        if value not in values:
            inputs = "sample, timestep, text, pooled text, time ids, class labels and guidance"
            raise ModelError(
                f"the denoiser's config has {key}={value!r}, so it reads more than the inputs that "
                f"qdexport exports ({inputs}); use a model with {key} {' or '.join(map(repr, values))}"
            )
