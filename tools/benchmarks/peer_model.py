"""The UNets of the comparison: the same class, configuration, seed and inputs in both environments."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

__all__ = ["OPTIONAL_LAYERS", "TIMESTEPS", "inputs", "unet"]

# calibration: three denoiser calls, as in ModelOpt's examples of the size of a smoke test
TIMESTEPS = (999, 500, 1)
# what ModelOpt's diffusers example (quantize.py, filter_func_default) leaves in floating point
OPTIONAL_LAYERS = r".*(time_emb_proj|time_embedding|conv_in|conv_out|conv_shortcut|add_embedding).*"


_MODELS: dict[str, dict[str, Any]] = {
    # 50.3 M parameters
    "unet50m": {
        "sample_size": 32,
        "cross_attention_dim": 256,
        "attention_head_dim": 8,
        "block_out_channels": (128, 256, 384),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    # 2,567 M: Stable Diffusion XL, on latents of 32 x 32, since both run it on a CPU
    "sdxl": {
        "sample_size": 32,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}


def unet(name: str) -> UNet2DConditionModel:
    """The model of that name, FP32, diffusers' own random weights of seed 0."""
    torch.manual_seed(0)
    return UNet2DConditionModel(in_channels=4, out_channels=4, **_MODELS[name]).eval()


def inputs(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A batch of two; the timestep is set apart."""
    source = torch.Generator().manual_seed(1)
    width = _MODELS[name]["cross_attention_dim"]
    given: dict[str, Any] = {
        "sample": torch.randn(2, 4, 32, 32, generator=source).to(dtype),
        "encoder_hidden_states": torch.randn(2, 77, width, generator=source).to(dtype),
    }
    if name == "sdxl":
        pooled = torch.randn(2, 1280, generator=source).to(dtype)
        sizes = torch.tensor([[256.0, 256, 0, 0, 256, 256]] * 2, dtype=dtype)
        given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    return given
