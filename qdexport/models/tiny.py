"""Whole diffusers pipelines small enough for a test: saved in under a second, sampled in another."""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    dtype: torch.dtype = torch.float32
    scheduler: str = "DDIMScheduler"
    variant: str | None = None
    max_shard_size: str | None = None
    pickled: bool = False
    seed: int = 0


def save_tiny_pipeline(folder: Path, family: Family = "sd", options: TinyOptions | None = None) -> Path:
    """Writes a pipeline with random weights, a tokenizer of bytes, and images of 16 x 16 pixels.

    Args:
        folder: Is created; existing files of the same names are replaced.
        family: `sd`, `sdxl` and `lcm` make images from prompts, `unet2d` and `class` (with class labels) without (8 x 8
            pixels); the transformers `dit` from class labels, `pixart`, `sd3` and `flux` from embeddings of text,
            since their pipelines have no text encoder.
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
    names = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    if family == "pixart":
        return diffusers.PixArtSigmaPipeline(**parts, text_encoder=None, tokenizer=None)
    if family == "sd3":
        return diffusers.StableDiffusion3Pipeline(**parts, **dict.fromkeys(names))
    return diffusers.FluxPipeline(**parts, **dict.fromkeys(name for name in names if not name.endswith("_3")))


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


def _text_encoder(*, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocabulary = _vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        num_hidden_layers=2,  # SDXL reads the last but one
        num_attention_heads=2,
        max_position_embeddings=_TOKENS,
        projection_dim=_TEXT_WIDTH,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _vocabulary() -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=_vocabulary(), merges=[], model_max_length=_TOKENS)
