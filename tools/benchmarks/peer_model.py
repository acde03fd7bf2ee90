"""The UNet of the comparison: the same class, configuration, seed and inputs in both environments."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

__all__ = ["OPTIONAL_LAYERS", "TIMESTEPS", "inputs", "unet"]

# calibration: three denoiser calls, as in ModelOpt's examples of the size of a smoke test
TIMESTEPS = (999, 500, 1)
# what ModelOpt's diffusers example (quantize.py, filter_func_default) leaves in floating point
OPTIONAL_LAYERS = r".*(time_emb_proj|time_embedding|conv_in|conv_out|conv_shortcut|add_embedding).*"


def unet() -> UNet2DConditionModel:
    """50.3 million parameters, FP32, diffusers' own random weights of seed 0."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=256,
        attention_head_dim=8,
        block_out_channels=(128, 256, 384),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    """A batch of two; the timestep is set apart."""
    source = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 32, 32, generator=source).to(dtype),
        "encoder_hidden_states": torch.randn(2, 77, 256, generator=source).to(dtype),
    }
