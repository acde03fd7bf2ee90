"""VAE decoders and text encoders with the published configurations and random weights, beside their denoisers."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, Literal, cast

import torch

from qdexport.core.companion_facts import CompanionName
from qdexport.core.recipe import Shapes
from qdexport.errors import ModelError
from qdexport.models.companions import Companion, companion_facts, companion_of
from qdexport.models.denoiser_classes import FLUX, TRANSFORMERS, family_of
from qdexport.models.denoiser_io import io_spec
from qdexport.models.loaded import LoadedModel, SamplingDefaults
from qdexport.models.synthetic import empty_unet, fill_randomly
from qdexport.models.torch_types import torch_dtype

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
_CLIP_G: Final[dict[str, Any]] = {
    **_CLIP,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5_XXL: Final[dict[str, Any]] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
# of SD3 and FLUX: 16 channels, and no convolution in front of the decoder
_VAE_16: Final[dict[str, Any]] = {
    **_VAE,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
    "force_upcast": True,
}
_SIZES: Final = {"sd15": 64, "sd21": 96}  # of the latent; all others 128


@dataclass(frozen=True, slots=True, kw_only=True)
class CompanionConfig:
    """A published configuration, and whose it is."""

    network: CompanionName
    denoiser: Literal["sd15", "sd21", "sdxl", "pixart", "sd3", "flux-blocks"]
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
        config=_CLIP_G,
    ),
    "sd3-vae": CompanionConfig(
        network="vae_decoder", denoiser="sd3", class_name="AutoencoderKL",
        config={**_VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    ),
    # the two CLIP encoders again, with projections
    "sd3-text": CompanionConfig(
        network="text_encoder", denoiser="sd3", class_name="CLIPTextModelWithProjection", config=_CLIP_L,
    ),
    "sd3-text-2": CompanionConfig(
        network="text_encoder_2", denoiser="sd3", class_name="CLIPTextModelWithProjection", config=_CLIP_G,
    ),
    # 4,762 M: the encoder of T5 v1.1 XXL, for 256 tokens
    "sd3-text-3": CompanionConfig(
        network="text_encoder_3", denoiser="sd3", class_name="T5EncoderModel", config=_T5_XXL,
    ),
    "flux-vae": CompanionConfig(
        network="vae_decoder", denoiser="flux-blocks", class_name="AutoencoderKL",
        config={**_VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    ),
    # CLIP ViT-L/14, of which the pooled text is read
    "flux-text": CompanionConfig(
        network="text_encoder", denoiser="flux-blocks", class_name="CLIPTextModel", config=_CLIP_L,
    ),
    # T5 v1.1 XXL again, for 512 tokens
    "flux-text-2": CompanionConfig(
        network="text_encoder_2", denoiser="flux-blocks", class_name="T5EncoderModel", config=_T5_XXL,
    ),
    # and for 300 tokens with a mask
    "pixart-text": CompanionConfig(
        network="text_encoder", denoiser="pixart", class_name="T5EncoderModel", config=_T5_XXL,
    ),
    # 4 of its 24 layers, which show what the others take
    "t5-blocks": CompanionConfig(
        network="text_encoder", denoiser="pixart", class_name="T5EncoderModel", config={**_T5_XXL, "num_layers": 4},
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
    facts = companion_facts(loaded, chosen.network, io, "auto", target, shapes or Shapes())
    made = fill_randomly(network, torch_dtype(facts.body), seed)
    if chosen.network != "vae_decoder":
        cast("Any", made).tie_weights()  # which allocating them has separated
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
        kind = "T5Config" if chosen.class_name.startswith("T5") else "CLIPTextConfig"
        config = getattr(transformers, kind)(**chosen.config)
        config._attn_implementation = "eager"  # as load_companion reads them
        return getattr(transformers, chosen.class_name)(config)


def _around(chosen: CompanionConfig, network: Any, name: str) -> LoadedModel:
    """A model whose pipeline has this network, and those beside it as far as they decide about names."""
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    parts: dict[str, Any] = {**dict.fromkeys((*encoders, "vae")), "vae_scale_factor": 8}
    if chosen.denoiser == "sdxl":
        parts["upcast_vae"] = None  # SDXL's pipelines have this method
        if chosen.network != "vae_decoder":
            parts |= {"text_encoder": network, "text_encoder_2": network}
    parts["vae" if chosen.network == "vae_decoder" else chosen.network] = network
    denoiser, size = empty_unet(chosen.denoiser), _SIZES.get(chosen.denoiser, 128)
    cfg = family_of(denoiser) != FLUX  # whose guidance is distilled
    defaults = SamplingDefaults(steps=25, guidance_scale=7.5, height=size, width=size, cfg=cfg)
    return LoadedModel(
        name=name,
        folder=None,
        pipeline=SimpleNamespace(**parts),
        denoiser=denoiser,
        component="transformer" if family_of(denoiser) in TRANSFORMERS else "unet",
        scheduler=None,
        weights_dtype="fp16",
        evaluator=None,
        defaults=defaults,
    )
