"""Configurations of published denoisers, and of tiny ones with every feature of their family."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["CONFIGS"]

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

_SDXL: Final[dict[str, Any]] = {
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
}
_DIT: Final[dict[str, Any]] = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
_PIXART: Final[dict[str, Any]] = {
    "_class_name": "PixArtTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "sample_size": 128,
    "patch_size": 2,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}
_SD3: Final[dict[str, Any]] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_FLUX: Final[dict[str, Any]] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
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
    "sdxl": _SDXL,
    # Stable Diffusion XL Turbo: SDXL at 512 pixels, in one to four steps
    "sdxl-turbo": {**_SDXL, "sample_size": 64},
    # 859.6 M, LCM Dreamshaper v7: SD 1.5 with an embedding of the guidance scale
    "lcm": {**_SD, "sample_size": 96, "cross_attention_dim": 768, "attention_head_dim": 8, "time_cond_proj_dim": 256},
    # 749.8 M, DiT-XL/2 at 256 pixels: 675 M, and an embedding of timesteps and classes in every block
    "dit": _DIT,
    # 610.9 M, PixArt-Sigma XL/2 at 1024 pixels (that of PixArt-alpha at 512 has the same layers)
    "pixart": _PIXART,
    # 2,028 M, Stable Diffusion 3 medium
    "sd3": _SD3,
    # 1,027 M of the 11.9 G of FLUX.1-dev: 2 of its 19 double blocks and 2 of its 38 single ones, the rest as it is
    "flux-blocks": {**_FLUX, "num_layers": 2, "num_single_layers": 2},
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
    "tiny_sd21": {
        **_SD,
        "sample_size": 8,
        "cross_attention_dim": 24,
        "attention_head_dim": (2, 4),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "tiny_lcm": {
        **_SD,
        "sample_size": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "time_cond_proj_dim": 16,
    },
    "tiny_class": {
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
        "num_class_embeds": 10,
    },
    "tiny_dit": {
        **_DIT,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "sample_size": 8,
    },
    "tiny_pixart": {
        **_PIXART,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "caption_channels": 32,
        "sample_size": 8,
    },
    # with the parts that 3.5 added: norms of queries and keys, a block with a second attention
    "tiny_sd3": {
        **_SD3,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "tiny_flux": {
        **_FLUX,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
}
