"""The four networks of the shapes model with random weights, its tokenizer and its scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qdexport.core.files import write_json
from qdexport.models.shapes import BACKGROUNDS, COLOURS, IMAGE_SIZE, RELATIONS, SHAPES

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler, UNet2DConditionModel, UNet2DModel
    from transformers import CLIPTextModel, CLIPTokenizer

__all__ = [
    "LATENT_SIZE",
    "PROMPT_TOKENS",
    "build_class_unet",
    "build_scheduler",
    "build_text_encoder",
    "build_tokenizer",
    "build_turbo_scheduler",
    "build_unet",
    "build_vae",
    "write_pipeline",
]

PROMPT_TOKENS: Final = 16
LATENT_SIZE: Final = 8
_LATENT_CHANNELS: Final = 4
_TEXT_WIDTH: Final = 64
_NOISE: Final = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_BOS: Final = "<|startoftext|>"
_EOS: Final = "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the letters and, through merges, every word of the grammar.

    Returns:
        132 tokens; BOS 130, EOS = padding = unknown 131; prompts are padded to 16.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = _byte_pairs(_grammar_words())
    for token in (_BOS, _EOS):
        vocabulary[token] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_TOKENS)


def _grammar_words() -> list[str]:
    relations = dict.fromkeys(word for relation in ("left of", "right of", *RELATIONS) for word in relation.split())
    # "of" comes after both sides: the order fixes the token numbers of the shipped model
    sides = [word for word in relations if word != "of"]
    sides.insert(2, "of")
    return ["on", "background", *sides, *COLOURS, *BACKGROUNDS, *SHAPES]


def _byte_pairs(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-pair encoding in which each word is one token."""
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            symbols = _merged(symbols, pair)
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            merges.append(pair)
            tokens.append("".join(pair))
            symbols = _merged(symbols, pair)
    return {token: number for number, token in enumerate(tokens)}, merges


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return result


def build_text_encoder() -> CLIPTextModel:
    """CLIPTextModel with random weights: 3 causal layers, width 64."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=132,
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=130,
            eos_token_id=131,
            pad_token_id=131,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """UNet2DConditionModel with random weights: 2.77 M parameters, [N, 4, 8, 8] latents."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=_TEXT_WIDTH,
        norm_num_groups=16,
    )


def build_vae(scaling_factor: float = 1.0) -> AutoencoderKL:
    """AutoencoderKL with random weights: [N, 3, 32, 32] pictures to [N, 4, 8, 8] latents.

    Args:
        scaling_factor: What latents are multiplied by to have unit variance.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=scaling_factor,
        mid_block_add_attention=False,
    )


def build_class_unet(sample_size: int) -> UNet2DModel:
    """Class-conditional UNet2DModel with random weights: 20 classes, 0.9 M parameters, [N, 3, size, size] pictures."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=sample_size,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=len(COLOURS) * len(SHAPES),
    )


def build_scheduler(*, clip_sample: bool = False, prediction_type: str = "epsilon") -> DDIMScheduler:
    """DDIM as Stable Diffusion configures it, 1000 timesteps; of pixels the estimate is clipped to [-1, 1]."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        **_NOISE,
        clip_sample=clip_sample,
        prediction_type=prediction_type,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_turbo_scheduler() -> LCMScheduler:
    """The consistency scheduler of the distilled model, on the same noise levels."""
    from diffusers import LCMScheduler

    return LCMScheduler(
        **_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, original_inference_steps=50
    )


def write_pipeline(folder: Path, parts: dict[str, Any]) -> None:
    """Writes a diffusers folder that `StableDiffusionPipeline.from_pretrained` reads.

    Args:
        folder: Created; files of the same names are replaced.
        parts: `vae`, `text_encoder`, `tokenizer`, `unet`, `scheduler`.
    """
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    for name in ("unet", "vae"):
        # diffusers notes where a part was loaded from; that place means nothing to the next machine
        path = folder / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        write_json(path, config)
