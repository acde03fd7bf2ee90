"""Whole diffusers pipelines small enough for a test: saved in under a second, sampled in another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from qdexport.models.library_logs import quiet_libraries
from qdexport.models.synthetic import random_unet

__all__ = ["TinyOptions", "save_tiny_pipeline"]

Family = Literal["sd", "sdxl", "unet2d", "lcm", "class", "dit", "pixart", "sd3", "flux"]
_TRANSFORMERS = ("dit", "pixart", "sd3", "flux")
_TOKENS = 77
_TEXT_WIDTH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyOptions:
    """How a tiny pipeline is written.

    Attributes:
        dtype: Type of all weights.
        scheduler: Name of a diffusers scheduler class.
        variant: Name in the weight files (`fp16`), or None.
        max_shard_size: Splits the denoiser's weights (`200KB`); None for one file.
        pickled: Writes PyTorch pickles in place of safetensors.
        seed: Chooses the random weights.
        text_encoders: Gives `pixart`, `sd3` and `flux` the text encoders of their kind, CLIP's and T5.
    """

    dtype: torch.dtype = torch.float32
    scheduler: str = "DDIMScheduler"
    variant: str | None = None
    max_shard_size: str | None = None
    pickled: bool = False
    seed: int = 0
    text_encoders: bool = False


def save_tiny_pipeline(folder: Path, family: Family = "sd", options: TinyOptions | None = None) -> Path:
    """Writes a pipeline with random weights, a tokenizer of bytes, and images of 16 x 16 pixels.

    Args:
        folder: Is created; existing files of the same names are replaced.
        family: `sd`, `sdxl` and `lcm` make images from prompts, `unet2d` and `class` (with class labels) without (8 x 8
            pixels); the transformers `dit` from class labels, `pixart`, `sd3` and `flux` from embeddings of text,
            since their pipelines have no text encoder unless the options ask for them.
        options: Types and files.

    Returns:
        The folder.
    """
    options = options or TinyOptions()
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        pipeline = _pipeline(family, options).to(options.dtype)
        shards = {} if options.max_shard_size is None else {"max_shard_size": options.max_shard_size}
        pipeline.save_pretrained(
            folder, variant=options.variant, safe_serialization=not options.pickled, **shards
        )
    return folder


def _pipeline(family: Family, options: TinyOptions) -> Any:
    import diffusers

    if family in _TRANSFORMERS:
        return _transformer_pipeline(family, options)
    # Stable Diffusion's noise levels; from_config drops what a scheduler class does not have
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = getattr(diffusers, options.scheduler).from_config({**noise, "clip_sample": False})
    unet = random_unet(f"tiny_{family}", options.dtype, options.seed)
    if family in ("unet2d", "class"):
        return diffusers.DDIMPipeline(unet=unet, scheduler=scheduler)
    parts = {
        "vae": _vae(),
        "text_encoder": _text_encoder(projection=False),
        "tokenizer": _tokenizer(),
        "unet": unet,
        "scheduler": scheduler,
    }
    if family == "lcm":
        unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        return diffusers.LatentConsistencyModelPipeline(**parts, **unused, requires_safety_checker=False)
    if family == "sd":
        unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        return diffusers.StableDiffusionPipeline(**parts, **unused, requires_safety_checker=False)
    second = {"text_encoder_2": _text_encoder(projection=True), "tokenizer_2": _tokenizer()}
    return diffusers.StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)


def _transformer_pipeline(family: Family, options: TinyOptions) -> Any:
    import diffusers

    transformer = random_unet(f"tiny_{family}", options.dtype, options.seed)
    flow = family in ("sd3", "flux")
    usual = "FlowMatchEulerDiscreteScheduler" if flow else options.scheduler
    settings = {"shift": 3.0, "use_dynamic_shifting": family == "flux"} if flow else {"clip_sample": False}
    scheduler = getattr(diffusers, usual).from_config(settings)
    parts = {"transformer": transformer, "scheduler": scheduler, "vae": _vae(4, shift=0.1 if flow else None)}
    if family == "dit":
        return diffusers.DiTPipeline(**parts)
    text = _text_parts(family, transformer.config, made=options.text_encoders)
    if family == "pixart":
        return diffusers.PixArtSigmaPipeline(**parts, **text)
    if family == "sd3":
        return diffusers.StableDiffusion3Pipeline(**parts, **text)
    return diffusers.FluxPipeline(**parts, **text)


def _text_parts(family: Family, config: Any, *, made: bool) -> dict[str, Any]:
    """Text encoders and tokenizers of a transformer's pipeline, as wide as it reads them; None without `made`."""
    if family == "pixart":
        encoders: list[Callable[[], Any]] = [lambda: _t5(config.caption_channels)]
    elif family == "sd3":
        half = config.pooled_projection_dim // 2
        clip = partial(_text_encoder, projection=True, width=half)
        encoders = [clip, clip, lambda: _t5(config.joint_attention_dim)]
    else:
        clip = partial(_text_encoder, projection=False, width=config.pooled_projection_dim)
        encoders = [clip, lambda: _t5(config.joint_attention_dim)]
    parts: dict[str, Any] = {}
    for number, encoder in zip(("", "_2", "_3"), encoders, strict=False):
        network = encoder() if made else None
        words = _t5_tokenizer if type(network).__name__ == "T5EncoderModel" else _tokenizer
        parts |= {f"text_encoder{number}": network, f"tokenizer{number}": words() if made else None}
    return parts


def _vae(channels: int = 4, *, shift: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        shift_factor=shift,
        norm_num_groups=4,
        sample_size=16,
    )


def _text_encoder(*, projection: bool, width: int = _TEXT_WIDTH) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocabulary = _vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,  # SDXL reads the last but one
        num_attention_heads=2,
        max_position_embeddings=_TOKENS,
        projection_dim=width,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(_t5_vocabulary()),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config).eval()


def _t5_vocabulary() -> list[tuple[str, float]]:
    """Pieces and their log likelihoods; the first three are T5's own."""
    letters = [chr(code) for code in range(32, 127)]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -4.0) for letter in letters)]


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=_t5_vocabulary(), extra_ids=0, additional_special_tokens=[])


def _vocabulary() -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=_vocabulary(), merges=[], model_max_length=_TOKENS)
