"""VAE decoders and text encoders with the published configurations and random weights, beside their denoisers."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, Literal

import torch

from qdexport.core.companion_facts import CompanionName
from qdexport.core.recipe import Shapes
from qdexport.errors import ModelError
from qdexport.models.companions import Companion, companion_facts, companion_of
from qdexport.models.denoiser_io import io_spec
from qdexport.models.loaded import LoadedModel, SamplingDefaults
from qdexport.models.synthetic import empty_unet, fill_randomly

__all__ = ["COMPANION_CONFIGS", "random_companion"]

_VAE: Final[dict[str, Any]] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "act_fn": "silu",
}
_CLIP: Final[dict[str, Any]] = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2}
_CLIP_L: Final[dict[str, Any]] = {
    **_CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompanionConfig:
    """A published configuration, and whose it is."""

    network: CompanionName
    denoiser: Literal["sd15", "sd21", "sdxl"]
    class_name: str
    config: dict[str, Any]


COMPANION_CONFIGS: Final[dict[str, CompanionConfig]] = {
    # 49.5 M parameters in the decoder
    "sd15-vae": CompanionConfig(
        network="vae_decoder", denoiser="sd15", class_name="AutoencoderKL",
        config={**_VAE, "sample_size": 512, "scaling_factor": 0.18215},
    ),
    # the same network at 1024 pixels; its activations overflow FP16
    "sdxl-vae": CompanionConfig(
        network="vae_decoder", denoiser="sdxl", class_name="AutoencoderKL",
        config={**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    ),
    # 123 M: CLIP ViT-L/14
    "sd15-text": CompanionConfig(network="text_encoder", denoiser="sd15", class_name="CLIPTextModel", config=_CLIP_L),
    # 340 M: OpenCLIP ViT-H/14 without its last layer
    "sd21-text": CompanionConfig(
        network="text_encoder", denoiser="sd21", class_name="CLIPTextModel",
        config={
            **_CLIP, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
            "num_hidden_layers": 23, "projection_dim": 512, "hidden_act": "gelu",
        },
    ),
    # CLIP ViT-L/14 again, read one layer earlier
    "sdxl-text": CompanionConfig(network="text_encoder", denoiser="sdxl", class_name="CLIPTextModel", config=_CLIP_L),
    # 695 M: OpenCLIP ViT-bigG/14
    "sdxl-text-2": CompanionConfig(
        network="text_encoder_2", denoiser="sdxl", class_name="CLIPTextModelWithProjection",
        config={
            **_CLIP, "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
            "num_hidden_layers": 32, "projection_dim": 1280, "hidden_act": "gelu",
        },
    ),
}  # fmt: skip


def random_companion(name: str, target: str, shapes: Shapes | None = None, seed: int = 0) -> Companion:
    """A network with random weights, in FP16 unless its own configuration speaks against it.

    Args:
        name: a key of ``COMPANION_CONFIGS``.
        target: name of the target.
        shapes: of the denoiser, whose rows are two per image; default: one image of the model's own size.
        seed: chooses the weights.

    Raises:
        ModelError: there is no configuration of this name.
    """
    if name not in COMPANION_CONFIGS:
        raise ModelError(f"no synthetic network {name!r}; there are {', '.join(COMPANION_CONFIGS)}")
    chosen = COMPANION_CONFIGS[name]
    network = _empty(chosen)
    loaded = _around(chosen, network, name)
    io = io_spec(loaded, shapes or Shapes(), "fp16")
    facts = companion_facts(loaded, chosen.network, io, "auto", target)
    made = fill_randomly(network, {"fp16": torch.float16, "fp32": torch.float32}[facts.body], seed)
    for key, buffer in made.named_buffers():
        if key.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return companion_of(made, facts)


def _empty(chosen: CompanionConfig) -> Any:
    import diffusers
    import transformers

    with torch.device("meta"):
        if chosen.network == "vae_decoder":
            vae = getattr(diffusers, chosen.class_name)(**chosen.config)
            del vae.encoder, vae.quant_conv  # only the decoder is compiled
            return vae
        config = transformers.CLIPTextConfig(**chosen.config)
        config._attn_implementation = "eager"  # as load_companion reads them
        return getattr(transformers, chosen.class_name)(config)


def _around(chosen: CompanionConfig, network: Any, name: str) -> LoadedModel:
    """A model whose pipeline has this network, and those beside it as far as they decide about names."""
    parts: dict[str, Any] = {"vae": None, "text_encoder": None, "text_encoder_2": None, "vae_scale_factor": 8}
    if chosen.denoiser == "sdxl":
        parts["upcast_vae"] = None  # SDXL's pipelines have this method
        if chosen.network != "vae_decoder":
            parts |= {"text_encoder": network, "text_encoder_2": network}
    parts["vae" if chosen.network == "vae_decoder" else chosen.network] = network
    size = {"sd15": 64, "sd21": 96, "sdxl": 128}[chosen.denoiser]
    defaults = SamplingDefaults(steps=25, guidance_scale=7.5, height=size, width=size, cfg=True)
    return LoadedModel(
        name=name,
        folder=None,
        pipeline=SimpleNamespace(**parts),
        denoiser=empty_unet(chosen.denoiser),
        component="unet",
        scheduler=None,
        weights_dtype="fp16",
        evaluator=None,
        defaults=defaults,
    )
