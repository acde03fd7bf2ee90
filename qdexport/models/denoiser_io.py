"""What goes into a denoiser and what comes out: named tensors, their shapes and types, and calls by name.

The names are those of the exported network, in this order, as far as a model has them: `sample`, `timestep`
(one number for all rows, int64; float32 for schedulers whose timesteps are fractions), `encoder_hidden_states`,
`text_embeds`, `time_ids`, `class_labels`; `timestep_cond` (LCM) or `guidance` (FLUX); of transformers
`encoder_attention_mask`, `resolution`, `aspect_ratio`, `pooled_projections`, `img_ids`, `txt_ids`; with
`shapes.controlnet` the residuals `down_block_res_0` to `down_block_res_N` and `mid_block_res`. The output is
`noise_pred`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from torch import nn

from qdexport.core.io_spec import Dim, IoSpec, Profile, TensorSpec
from qdexport.core.precision import BODIES, NUMPY
from qdexport.core.recipe import Shapes
from qdexport.errors import ModelError, RecipeError
from qdexport.models.denoiser_calls import call_denoiser, example_inputs, named_inputs
from qdexport.models.denoiser_classes import (
    DIT,
    FLUX,
    SD3,
    TRANSFORMERS,
    check_denoiser,
    config_of,
    denoiser_class,
    family_of,
)
from qdexport.models.extra_inputs import (
    check_size,
    check_text_length,
    guidance_inputs,
    packed_tokens,
    residual_inputs,
    text_tokens,
    transformer_inputs,
)
from qdexport.models.loaded import LoadedModel
from qdexport.models.schedules import timestep_dtype
from qdexport.models.shape_ranges import dims_of

__all__ = [
    "call_denoiser",
    "check_denoiser",
    "denoiser_class",
    "example_inputs",
    "io_spec",
    "label_count",
    "latent_dims",
    "latent_size",
    "named_inputs",
    "size_multiple",
    "sized",
]

_DEFAULT_TOKENS: Final = 77  # every CLIP text encoder
_MOST_TOKENS: Final = 1_000_000
_FLUX_SIZE: Final = 128  # of the latent, 1024 pixels: its config does not say
_TIME_ID_COUNT: Final = 6  # SDXL: original size, crop corner, target size


def latent_size(denoiser: nn.Module) -> tuple[int | None, int | None]:
    """Height and width that the config of a denoiser calls its own; None where it does not say."""
    size = config_of(denoiser).get("sample_size", _FLUX_SIZE if family_of(denoiser) == FLUX else None)
    if size is None or isinstance(size, int):
        return size, size
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(item, int) for item in size):
        raise ModelError(f"sample_size in the {type(denoiser).__name__}'s config is {size!r}, not one or two sizes")
    height, width = size
    return height, width


def size_multiple(denoiser: nn.Module) -> int:
    """What the height and width of a sample must be a multiple of: 2 to the number of downsampling blocks, or the
    edge of a patch.
    """
    config = config_of(denoiser)
    if family_of(denoiser) in TRANSFORMERS:
        return 2 if family_of(denoiser) == FLUX else int(config["patch_size"])
    blocks = denoiser.get_submodule("down_blocks").children()
    count = sum(getattr(block, "downsamplers", None) is not None for block in blocks)
    return 1 << count


def io_spec(model: LoadedModel | nn.Module, shapes: Shapes, body: str, *, fractions: bool = False) -> IoSpec:
    """The inputs and the output of the exported network.

    Args:
        model: A loaded model, or a bare denoiser (then the text length defaults to 77 tokens).
        shapes: Sizes, fixed or ranges. The best of a range that names none is the model's own size, or the
            nearest inside the range.
        body: `fp32` or `fp16`, the type of the floating-point inputs and of the output.
        fractions: The timestep is a floating-point number in any case, unless the denoiser has a table of timesteps.

    Raises:
        RecipeError: A size is not a multiple of what the downsampling needs, a range is out of order, a profile leaves
            its range, a size is neither in the recipe nor in the model's config, or the denoiser takes no residuals
            (`shapes.controlnet`).
    """
    if body not in BODIES:
        raise RecipeError(f"no body type {body!r}; use {' or '.join(BODIES)}")
    denoiser = model.denoiser if isinstance(model, LoadedModel) else model
    config, dtype = config_of(denoiser), NUMPY[body]
    ranges, profiles = _ranges(model, denoiser, shapes)
    batch, height, width = (ranges[name] for name in ("batch", "height", "width"))
    check_size(denoiser, height, width)
    packed = packed_tokens(denoiser, height, width)
    rows = _image(batch, packed, height, width, config["in_channels"])
    inputs = [
        TensorSpec(name="sample", role="sample", dtype=dtype, dims=rows),
        TensorSpec(name="timestep", role="timestep", dtype=_timestep_dtype(model, fractions), dims=(_fixed(1),)),
    ]
    tokens = ranges.get("tokens")
    if tokens is not None:
        dims = (batch, tokens, _fixed(_text_width(config)))
        inputs.append(TensorSpec(name="encoder_hidden_states", role="text", dtype=dtype, dims=dims))
    if config.get("addition_embed_type") == "text_time":
        pooled, ids = _added_widths(model, config)
        text = (batch, _fixed(pooled))
        inputs.append(TensorSpec(name="text_embeds", role="text_pooled", dtype=dtype, dims=text))
        inputs.append(TensorSpec(name="time_ids", role="time_ids", dtype=dtype, dims=(batch, _fixed(ids))))
    if getattr(denoiser, "class_embedding", None) is not None:
        inputs.append(_class_spec(denoiser, batch, dtype))
    inputs.extend(guidance_inputs(denoiser, batch, dtype))
    inputs.extend(transformer_inputs(denoiser, batch, tokens, packed, dtype))
    if shapes.controlnet:
        inputs.extend(residual_inputs(denoiser, batch, (height, width), dtype))
    channels = config.get("out_channels") or config["in_channels"]
    outputs = _image(batch, packed, height, width, channels)
    prediction = TensorSpec(name="noise_pred", role="prediction", dtype=dtype, dims=outputs)
    return IoSpec(inputs=tuple(inputs), outputs=(prediction,), profiles=profiles)


def _timestep_dtype(model: LoadedModel | nn.Module, fractions: bool) -> str:
    denoiser = model.denoiser if isinstance(model, LoadedModel) else model
    learned = isinstance(getattr(denoiser, "time_proj", None), nn.Embedding)
    return "float32" if fractions and not learned else timestep_dtype(model)


def label_count(denoiser: nn.Module) -> int | None:
    """How many rows the table of classes has (one of DiT's for no class, too); None without such a table."""
    if family_of(denoiser) == DIT:
        tables = (layer for name, layer in denoiser.named_modules() if name.endswith("class_embedder.embedding_table"))
        embedding = next(tables, None)
    else:
        embedding = getattr(denoiser, "class_embedding", None)
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def latent_dims(loaded: LoadedModel, shapes: Shapes) -> tuple[Dim, Dim]:
    """Height and width of the latent, also of a denoiser whose samples are packed to tokens. Raises as io_spec does."""
    ranges, _ = _ranges(loaded, loaded.denoiser, shapes)
    return ranges["height"], ranges["width"]


def sized(loaded: LoadedModel, shapes: Shapes) -> LoadedModel:
    """A model whose own sizes are those of the recipe, so that what is calibrated and checked is what is exported.

    Height and width only where its config says none, or its schedule depends on them (SD3, FLUX); the length of the
    text where its pipeline can be told one (SD3, FLUX, PixArt).

    Raises:
        RecipeError: as :func:`io_spec`, or the pipeline makes no texts of that length.
    """
    denoiser, defaults = loaded.denoiser, loaded.defaults
    ranges, _ = _ranges(loaded, denoiser, shapes)
    if latent_size(denoiser) == (None, None) or family_of(denoiser) in (SD3, FLUX):
        defaults = replace(defaults, height=ranges["height"].best, width=ranges["width"].best)
    if text_tokens(denoiser, loaded.pipeline) is not None:
        check_text_length(denoiser, loaded.pipeline, ranges["tokens"])
        defaults = replace(defaults, tokens=ranges["tokens"].best)
    return replace(loaded, defaults=defaults)


def _ranges(
    model: LoadedModel | nn.Module, denoiser: nn.Module, shapes: Shapes
) -> tuple[dict[str, Dim], tuple[Profile, ...]]:
    return dims_of(shapes, _own_sizes(model, denoiser), size_multiple(denoiser))


def _image(batch: Dim, packed: Dim | None, height: Dim, width: Dim, channels: int) -> tuple[Dim, ...]:
    if packed is not None:
        return (batch, packed, _fixed(channels))
    return (batch, _fixed(channels), height, width)


def _reads_text(denoiser: nn.Module) -> bool:
    return "encoder_hidden_states" in inspect.signature(type(denoiser).forward).parameters


def _text_width(config: Mapping[str, Any]) -> int:
    width = (
        config.get("encoder_hid_dim")
        or config.get("caption_channels")  # PixArt
        or config.get("joint_attention_dim")  # SD3, FLUX
        or config["cross_attention_dim"]
    )
    return int(width if isinstance(width, int) else width[0])


def _token_count(model: LoadedModel | nn.Module) -> int:
    pipeline = model.pipeline if isinstance(model, LoadedModel) else None
    count = text_tokens(model.denoiser if isinstance(model, LoadedModel) else model, pipeline)
    if count is not None:
        return count
    tokenizer = getattr(model.pipeline, "tokenizer", None) if isinstance(model, LoadedModel) else None
    if tokenizer is None and isinstance(model, LoadedModel):
        tokenizer = getattr(model.pipeline, "tokenizer_2", None)  # the SDXL refiner has only this one
    if tokenizer is None:
        return _DEFAULT_TOKENS
    count = int(tokenizer.model_max_length)
    if not 0 < count <= _MOST_TOKENS:  # transformers has 10**30 where the file says nothing
        raise ModelError(
            f"model_max_length of the tokenizer is {count:.3g}: the length of texts is unknown; set it in "
            "tokenizer_config.json (77 for CLIP)"
        )
    return count


def _added_widths(model: LoadedModel | nn.Module, config: Mapping[str, Any]) -> tuple[int, int]:
    """Width of the pooled text, and count of the time ids: they fill the added embedding's input together."""
    total, each = int(config["projection_class_embeddings_input_dim"]), int(config["addition_time_embed_dim"])
    encoder = getattr(model.pipeline, "text_encoder_2", None) if isinstance(model, LoadedModel) else None
    if encoder is not None:
        pooled = int(encoder.config.projection_dim)
        return pooled, (total - pooled) // each
    # The refiner has five ids; its text encoder's pooled output is as wide as its tokens
    pooled = _text_width(config)
    if total == pooled + (_TIME_ID_COUNT - 1) * each:
        return pooled, _TIME_ID_COUNT - 1
    return total - _TIME_ID_COUNT * each, _TIME_ID_COUNT


def _class_spec(denoiser: nn.Module, batch: Dim, dtype: str) -> TensorSpec:
    embedding, kind = denoiser.get_submodule("class_embedding"), config_of(denoiser).get("class_embed_type")
    if isinstance(embedding, nn.Embedding) or kind == "timestep":
        return TensorSpec(name="class_labels", role="class_labels", dtype="int64", dims=(batch,))
    first = next((layer for layer in embedding.modules() if isinstance(layer, nn.Linear)), None)
    # `identity` adds the labels to the time embedding as they are
    time_width = denoiser.get_submodule("time_embedding.linear_2").out_features
    width = time_width if first is None else first.in_features
    dims = (batch, _fixed(int(width)))  # type: ignore[arg-type]  # a Linear's width is an int
    return TensorSpec(name="class_labels", role="class_labels", dtype=dtype, dims=dims)


def _own_sizes(model: LoadedModel | nn.Module, denoiser: nn.Module) -> dict[str, int | None]:
    """The sizes that a model calls its own; no `tokens` where it reads no text."""
    height, width = latent_size(denoiser)
    cfg = _reads_text(denoiser)
    if isinstance(model, LoadedModel):
        height, width, cfg = model.defaults.height, model.defaults.width, model.defaults.cfg
    own = {"batch": 2 if cfg else 1, "height": height, "width": width}
    return {**own, "tokens": _token_count(model)} if _reads_text(denoiser) else own


def _fixed(size: int) -> Dim:
    return Dim(low=size, best=size, high=size)
