"""Inputs beside sample, timestep and text: pooled text, guidance, positions, masks, residuals of a ControlNet."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Final

from torch import nn

from qdexport.core.io_spec import Dim, TensorSpec
from qdexport.errors import RecipeError
from qdexport.models.denoiser_calls import DOWN_RESIDUAL, MID_RESIDUAL
from qdexport.models.denoiser_classes import DIT, FLUX, PIXART, SD3, config_of, family_of

__all__ = [
    "check_size",
    "check_text_length",
    "clip_tokens",
    "guidance_inputs",
    "packed_tokens",
    "residual_inputs",
    "sequence_length",
    "text_tokens",
    "transformer_inputs",
]

_PACKED: Final = 2  # FLUX's pipelines make one token of 2 x 2 latents
_TOKENS: Final = {SD3: 333, FLUX: 512, PIXART: 300}  # SD3: 77 of CLIP and 256 of T5, the pipelines' defaults
_LONGEST: Final = {SD3: 512, FLUX: 512}  # what their pipelines take as max_sequence_length
_AXES: Final = 3  # of a FLUX position: index of the picture, row, column


def text_tokens(denoiser: nn.Module, pipeline: Any | None) -> int | None:
    """The text length that a family's pipeline makes; None where its tokenizer says."""
    family = family_of(denoiser)
    if family not in _TOKENS:
        return None
    known = {} if pipeline is None else inspect.signature(type(pipeline).__call__).parameters
    own = known.get("max_sequence_length")
    if own is None or own.default is inspect.Parameter.empty:
        return _TOKENS[family]
    return _clip_part(denoiser, pipeline) + int(own.default)


def sequence_length(denoiser: nn.Module, pipeline: Any, tokens: int) -> int:
    """The pipeline's ``max_sequence_length`` that makes texts of some length: SD3's is T5's part, behind CLIP's."""
    return tokens - _clip_part(denoiser, pipeline)


def check_text_length(denoiser: nn.Module, pipeline: Any | None, tokens: Dim) -> None:
    """Refuses texts that the pipeline cannot make.

    Raises:
        RecipeError: nothing is left for T5 behind CLIP's tokens, or the pipeline takes no such length.
    """
    clip = _clip_part(denoiser, pipeline)
    longest = _LONGEST.get(family_of(denoiser))
    if tokens.low <= clip or (longest is not None and tokens.best > clip + longest):
        kind, most = family_of(denoiser), "or more" if longest is None else f"to {clip + longest}"
        asked = tokens.low if tokens.low <= clip else tokens.best
        raise RecipeError(f"shapes.tokens is {asked}, and pipelines of {kind} make texts of {clip + 1} {most}")


def clip_tokens(pipeline: Any | None) -> int:
    """The text length of a pipeline's CLIP encoders."""
    return int(getattr(pipeline, "tokenizer_max_length", 77))


def _clip_part(denoiser: nn.Module, pipeline: Any | None) -> int:
    """How many tokens of the denoiser's text are CLIP's, in front of T5's."""
    return clip_tokens(pipeline) if family_of(denoiser) == SD3 else 0


def check_size(denoiser: nn.Module, height: Dim, width: Dim) -> None:
    """Refuses what a family cannot do.

    Raises:
        RecipeError: DiT is asked for a sample that is no square: its code takes the root of the number of tokens.
    """
    sizes = [(dim.low, dim.best, dim.high) for dim in (height, width)]
    if family_of(denoiser) == DIT and (sizes[0] != sizes[1] or height.dynamic):
        raise RecipeError(
            f"{DIT} computes squares of one size only; set shapes.height and shapes.width to one equal number"
        )


def packed_tokens(denoiser: nn.Module, height: Dim, width: Dim) -> Dim | None:
    """The number of tokens of a sample [N, tokens, C]; None for a family whose samples are [N, C, H, W]."""
    if family_of(denoiser) != FLUX:
        return None
    low, best, high = (
        (a // _PACKED) * (b // _PACKED)
        for a, b in ((height.low, width.low), (height.best, width.best), (height.high, width.high))
    )
    return Dim(name="image_tokens", low=low, best=best, high=high)


def guidance_inputs(denoiser: nn.Module, batch: Dim, dtype: str) -> Iterator[TensorSpec]:
    """The embedding of the guidance scale (LCM), or the scale itself (FLUX), of models that are distilled with it."""
    config, family = config_of(denoiser), family_of(denoiser)
    width = config.get("time_cond_proj_dim") if family == "UNet2DConditionModel" else None
    if width is not None:
        yield TensorSpec(name="timestep_cond", role="guidance", dtype=dtype, dims=(batch, _fixed(width)))
    if family == FLUX and config["guidance_embeds"]:
        yield TensorSpec(name="guidance", role="guidance", dtype=dtype, dims=(batch,))


def transformer_inputs(
    denoiser: nn.Module, batch: Dim, tokens: Dim | None, image_tokens: Dim | None, dtype: str
) -> Iterator[TensorSpec]:
    """What transformers read beside sample, timestep, text and guidance, in call order."""
    config, family = config_of(denoiser), family_of(denoiser)
    if family == PIXART and tokens is not None:
        yield TensorSpec(name="encoder_attention_mask", role="text_mask", dtype=dtype, dims=(batch, tokens))
        if _reads_size(denoiser):
            yield TensorSpec(name="resolution", role="image_size", dtype=dtype, dims=(batch, _fixed(2)))
            yield TensorSpec(name="aspect_ratio", role="image_size", dtype=dtype, dims=(batch, _fixed(1)))
    if family in (SD3, FLUX):
        width = _fixed(config["pooled_projection_dim"])
        yield TensorSpec(name="pooled_projections", role="text_pooled", dtype=dtype, dims=(batch, width))
    if family == FLUX and tokens is not None and image_tokens is not None:
        for name, count in (("img_ids", image_tokens), ("txt_ids", tokens)):
            yield TensorSpec(name=name, role="position_ids", dtype="int64", dims=(count, _fixed(_AXES)))
    if family == DIT:
        yield TensorSpec(name="class_labels", role="class_labels", dtype="int64", dims=(batch,))


def residual_inputs(denoiser: nn.Module, batch: Dim, size: tuple[Dim, Dim], dtype: str) -> Iterator[TensorSpec]:
    """What a ControlNet adds to the skip connections of a UNet, in their order, and to its middle.

    Raises:
        RecipeError: the denoiser is no UNet with text.
    """
    if family_of(denoiser) != "UNet2DConditionModel":
        raise RecipeError(
            f"shapes.controlnet needs a UNet2DConditionModel, and the denoiser is a {family_of(denoiser)}; remove it"
        )
    channels = denoiser.get_submodule("conv_in").out_channels
    shapes: list[tuple[Any, int]] = [(channels, 1)]
    factor = 1
    for block in denoiser.get_submodule("down_blocks").children():
        for resnet in block.get_submodule("resnets").children():
            channels = resnet.out_channels
            shapes.append((channels, factor))
        if getattr(block, "downsamplers", None) is not None:
            factor *= 2
            shapes.append((channels, factor))
    for index, (width, scale) in enumerate(shapes):
        yield _residual(f"{DOWN_RESIDUAL}{index}", (batch, _fixed(width), *_smaller(size, scale)), dtype)
    yield _residual(MID_RESIDUAL, (batch, _fixed(shapes[-1][0]), *_smaller(size, factor)), dtype)


def _residual(name: str, dims: tuple[Dim, ...], dtype: str) -> TensorSpec:
    return TensorSpec(name=name, role="residual", dtype=dtype, dims=dims)


def _smaller(size: tuple[Dim, Dim], factor: int) -> tuple[Dim, Dim]:
    height, width = (
        Dim(
            name=f"{dim.name}_{factor}" if factor > 1 else dim.name,
            low=dim.low // factor,
            best=dim.best // factor,
            high=dim.high // factor,
        )
        for dim in size
    )
    return height, width


def _reads_size(denoiser: nn.Module) -> bool:
    return bool(getattr(denoiser, "use_additional_conditions", False))


def _fixed(size: Any) -> Dim:
    return Dim(low=int(size), best=int(size), high=int(size))
