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

__all__ = ["CONFIGS", "denoiser_class", "empty_unet", "fill_randomly", "random_unet"]

_CROSS3: Final = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_CROSS3_UP: Final = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
_SD: Final[dict[str, Any]] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": _CROSS3,
    "up_block_types": _CROSS3_UP,
}

CONFIGS: Final[dict[str, dict[str, Any]]] = {
    # 859.5 M parameters, Stable Diffusion 1.1 to 1.5
    "sd15": {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8},
    # 865.9 M, Stable Diffusion 2.1 at 768 pixels
    "sd21": {
        **_SD,
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    # 2,567 M, Stable Diffusion XL base 1.0
    "sdxl": {
        **_SD,
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    # 50.3 M: a text-to-image denoiser of the size that compilers are often measured with
    "medium": {
        **_SD,
        "sample_size": 32,
        "cross_attention_dim": 256,
        "attention_head_dim": 8,
        "block_out_channels": (128, 256, 384),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    # 35.7 M, DDPM on CIFAR-10: pixel space, head_dim None (one head), asymmetric padding when downsampling
    "ddpm_cifar10": {
        "_class_name": "UNet2DModel",
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
    # 274 M, unconditional latent diffusion (CelebA-HQ 256, LSUN): a VQ latent of 3 channels
    "ldm_uncond": {
        "_class_name": "UNet2DModel",
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (224, 448, 672, 896),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 32,
    },
    "tiny_sd": {
        **_SD,
        "sample_size": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "tiny_sdxl": {
        **_SD,
        "sample_size": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": (2, 4),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,  # 6 numbers of 8 each, and a pooled text of 16
    },
    "tiny_unet2d": {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
}

# a prime: rows of a weight repeat only after this many rows, whatever the width of the layer
_BLOCK: Final = 1_048_573


def denoiser_class(name: str) -> type[nn.Module]:
    """The diffusers class of a denoiser, by the `_class_name` of its config.

    Raises:
        ModelError: qdexport does not compile this class.
    """
    from diffusers import UNet2DConditionModel, UNet2DModel

    classes: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in (UNet2DConditionModel, UNet2DModel)}
    if name not in classes:
        raise ModelError(
            f"{name!r} is not a denoiser that qdexport compiles; supported: {', '.join(classes)}"
        )
    return classes[name]


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
    with torch.no_grad():
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                    parameter.fill_(1.0 if key == "weight" else 0.0)
                    continue
                _fill(parameter, block, offset, _deviation(module, key, parameter))
                offset = (offset + parameter.numel() + 1) % _BLOCK
    return model.eval()


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
