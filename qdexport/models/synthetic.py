"""Denoisers with real configurations and random weights: the real names, shapes and costs without a download.

For tests, benchmarks and experiments at full size. The `tiny_*` ones have every feature of their family
(both kinds of attention, shortcuts, down- and upsampling, added conditions) in less than a million
parameters.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import nn

from qdexport.errors import ModelError
from qdexport.models.configs import CONFIGS
from qdexport.models.denoiser_classes import denoiser_class

__all__ = ["CONFIGS", "empty_unet", "fill_randomly", "random_unet"]

# a prime: rows of a weight repeat only after this many rows, whatever the width of the layer
_BLOCK: Final = 1_048_573


def empty_unet(name: str, **changes: Any) -> nn.Module:
    """A denoiser on the meta device: shapes and names without memory.

    Args:
        name: A key of `CONFIGS`.
        changes: Config entries that replace those of the named configuration.

    Raises:
        ModelError: There is no configuration of this name.
    """
    if name not in CONFIGS:
        raise ModelError(f"no synthetic model {name!r}; there are {', '.join(CONFIGS)}")
    config = {**CONFIGS[name], **changes}
    cls = denoiser_class(config.pop("_class_name"))
    with torch.device("meta"):
        return cls(**config).eval()


def random_unet(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """A denoiser with random weights, in eval mode; the same seed gives the same weights.

    Weights are normal with variance 1 / fan_in, biases a tenth of that size, norms 1 and 0: activations
    neither vanish nor explode. All come from one block of about a million numbers, repeated at a different
    offset in every tensor, so memory stays at the size of the weights in `dtype`, and 2.6 billion
    parameters take seconds.

    Args:
        name: A key of `CONFIGS`.
        dtype: Type of the weights.
        seed: Chooses the block.
        changes: Config entries that replace those of the named configuration.

    Raises:
        ModelError: There is no configuration of this name.
    """
    return fill_randomly(empty_unet(name, **changes), dtype, seed)


def fill_randomly(model: nn.Module, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Gives a model on the meta device the weights of :func:`random_unet`, in memory and in eval mode.

    Args:
        model: Is changed; buffers are left undefined.
        dtype: Type of the weights.
        seed: Chooses the block.
    """
    # ModelMixin.to would warn about modules to keep in fp32, of which UNets have none
    model = nn.Module.to(model, dtype).to_empty(device="cpu")
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed)).to(dtype)
    offset = 0
    from diffusers.models.normalization import RMSNorm as OwnRMSNorm

    with torch.no_grad():
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm | OwnRMSNorm):
                    parameter.fill_(1.0 if key == "weight" else 0.0)
                    continue
                _fill(parameter, block, offset, _deviation(module, key, parameter))
                offset = (offset + parameter.numel() + 1) % _BLOCK
    _restore_positions(model, dtype)
    return model.eval()


def _restore_positions(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes the embeddings of positions again, which are no weights: the only buffers that denoisers have."""
    from diffusers.models.embeddings import PatchEmbed

    for module in model.modules():
        if isinstance(module, PatchEmbed):
            own: Any = module
            fresh = PatchEmbed(
                height=own.height * own.patch_size,
                width=own.width * own.patch_size,
                patch_size=own.patch_size,
                in_channels=own.proj.in_channels,
                embed_dim=own.proj.out_channels,
                interpolation_scale=own.interpolation_scale,
                pos_embed_max_size=own.pos_embed_max_size,
            )
            own.pos_embed = fresh.pos_embed.to(dtype)


def _deviation(module: nn.Module, key: str, parameter: torch.Tensor) -> float:
    if isinstance(module, nn.Conv2d | nn.Linear):
        deviation = 1 / math.sqrt(module.weight[0].numel())
        return deviation if key == "weight" else 0.1 * deviation
    return 1.0 if parameter.ndim < 2 else 1 / math.sqrt(parameter.shape[-1])


def _fill(parameter: torch.Tensor, block: torch.Tensor, offset: int, deviation: float) -> None:
    flat = parameter.view(-1)
    start = 0
    while start < flat.numel():
        count = min(flat.numel() - start, _BLOCK - offset)
        torch.mul(block[offset : offset + count], deviation, out=flat[start : start + count])
        start += count
        offset = 0
