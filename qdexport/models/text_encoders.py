"""The text encoders of a pipeline: what a denoiser reads of each, and modules that compute just that.

    SD 1.x, 2.x   CLIP: the last hidden states
    SDXL          two CLIP: the last but one hidden states, and the second's projected pooled text
    SD3           two CLIP: the last but one hidden states and the projected pooled text of both; T5
    FLUX          CLIP: the pooled text alone; T5
    PixArt        T5, which reads the tokenizer's attention mask too

T5's residual stream leaves the range of FP16, and transformers keeps its ``wo`` layers in FP32. So here the stream and
these layers are FP32 in an FP16 body, from the embedding on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn

from qdexport.core.companion_facts import CompanionFacts, CompanionName
from qdexport.core.io_spec import Dim, IoSpec, Role, TensorSpec
from qdexport.errors import ModelError
from qdexport.models.denoiser_classes import FLUX, PIXART, SD3, config_of, family_of
from qdexport.models.extra_inputs import check_text_length, clip_tokens
from qdexport.models.loaded import LoadedModel

__all__ = ["ENCODERS", "encoder_facts", "text_encoder", "why_no_encoder", "wide_modules"]

_CLIP: Final = ("CLIPTextModel", "CLIPTextModelWithProjection")
_T5: Final = ("T5EncoderModel",)
ENCODERS: Final = (*_CLIP, *_T5)
# of transformers' T5: its outputs exceed FP16 (google/flan-t5-xxl), see T5PreTrainedModel._keep_in_fp32_modules
_T5_WIDE: Final = ("wo",)
_UNET: Final = "UNet2DConditionModel"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """What a denoiser reads of one encoder.

    Attributes:
        classes: that the encoder may be of.
        layer: of the hidden states; None when they are not read.
        pooled: the pooled text that is read.
        mask: whether the encoder is told which tokens are padding.
        suffix: of the outputs' names, where several encoders have the same ones.
        then: how the outputs become the denoiser's input, where that takes more than handing them over.
    """

    classes: tuple[str, ...]
    layer: Literal[-1, -2] | None = -1
    pooled: Literal["text_embeds", "pooler_output"] | None = None
    mask: bool = False
    suffix: str = ""
    then: str = ""


_SD3_JOINED: Final = (
    "the denoiser reads encoder_hidden_states_1 and _2 concatenated along the last axis, padded with zeros to the "
    "width of _3, and _3 behind them along the tokens (zeros without text_encoder_3); and pooled_projections_1 and _2 "
    "concatenated"
)
_READINGS: Final[dict[str, dict[CompanionName, _Reading]]] = {
    SD3: {
        "text_encoder": _Reading(classes=_CLIP[1:], layer=-2, pooled="text_embeds", suffix="_1", then=_SD3_JOINED),
        "text_encoder_2": _Reading(classes=_CLIP[1:], layer=-2, pooled="text_embeds", suffix="_2", then=_SD3_JOINED),
        "text_encoder_3": _Reading(classes=_T5, suffix="_3", then=_SD3_JOINED),
    },
    FLUX: {
        "text_encoder": _Reading(classes=_CLIP[:1], layer=None, pooled="pooler_output"),
        "text_encoder_2": _Reading(classes=_T5),
    },
    PIXART: {"text_encoder": _Reading(classes=_T5, mask=True)},
    _UNET: {"text_encoder": _Reading(classes=_CLIP)},
}


def why_no_encoder(loaded: LoadedModel, name: CompanionName, encoder: Any) -> str:
    """Why a text encoder cannot be compiled; empty when it can.

    Args:
        loaded: the model with its pipeline.
        name: of the encoder.
        encoder: the pipeline's.
    """
    kind = type(encoder).__name__
    if kind not in ENCODERS:
        return f"its class is {kind}, and qdexport compiles {', '.join(ENCODERS)}"
    readings = _readings(loaded)
    if not readings:
        return "the denoiser reads no text"
    if getattr(encoder.config, "use_attention_mask", False):
        return "it reads an attention mask (use_attention_mask), which has no input in the exported network"
    if name not in readings:
        if family_of(loaded.denoiser) == _UNET:
            return "the denoiser is not of SDXL's kind (addition_embed_type text_time), so what it reads is not known"
        return f"what a {family_of(loaded.denoiser)} reads of it is not known"
    if kind not in readings[name].classes:
        known = " or ".join(readings[name].classes)
        return f"its class is {kind}, and a denoiser of class {family_of(loaded.denoiser)} reads {known} here"
    return ""


def encoder_facts(
    loaded: LoadedModel, name: CompanionName, encoder: Any, images: Dim, denoiser: IoSpec
) -> dict[str, Any]:
    """Inputs, outputs and usage of one text encoder, as fields of :class:`CompanionFacts`.

    Args:
        loaded: the model with its pipeline.
        name: of the encoder.
        encoder: the pipeline's.
        images: the rows.
        denoiser: inputs and outputs of the exported denoiser.

    Raises:
        ModelError: the text is longer than the encoder allows.
        RecipeError: it is too short to hold what the others give.
    """
    text = denoiser.by_role("text")
    if text is None:
        raise ModelError(f"the {name} has no reader: the exported denoiser has no text input")
    reading = _readings(loaded)[name]
    tokens = _tokens(loaded, name, encoder, text.dims[1])
    ids = [TensorSpec(name="input_ids", role="tokens", dtype="int64", dims=(images, tokens))]
    usage = ["input_ids: of the tokenizer, padded to the full length"]
    if reading.mask:
        ids.append(TensorSpec(name="attention_mask", role="text_mask", dtype="int64", dims=(images, tokens)))
        usage.append("attention_mask: of the tokenizer, 1 for a token and 0 for padding")
    outputs = []
    if reading.layer is not None:
        hidden = f"encoder_hidden_states{reading.suffix}"
        width = int(encoder.config.hidden_size)  # T5's config maps it to d_model
        outputs.append(_floats(hidden, "text", text.dtype, (images, tokens, _fixed(width))))
        usage.append(f"{hidden}: the last {'' if reading.layer == -1 else 'but one '}hidden states")
    if reading.pooled is not None:
        pooled = "text_embeds" if _is_xl(loaded) else f"pooled_projections{reading.suffix}"
        projected = reading.pooled == "text_embeds"
        width = int(encoder.config.projection_dim if projected else encoder.config.hidden_size)
        outputs.append(_floats(pooled, "text_pooled", text.dtype, (images, _fixed(width))))
        usage.append(f"{pooled}: the {'projected ' if projected else ''}pooled text")
    return {
        "io": IoSpec(inputs=tuple(ids), outputs=tuple(outputs)),
        "usage": "; ".join([*usage, *([reading.then] if reading.then else [])]),
        "hidden_layer": reading.layer,
        "pooled": reading.pooled,
    }


def wide_modules(class_name: str, body: str) -> tuple[str, ...]:
    """Modules of an encoder that compute in FP32 whatever the body is, by the last part of their path."""
    return _T5_WIDE if class_name in _T5 and body == "fp16" else ()


def text_encoder(encoder: nn.Module, facts: CompanionFacts, outer: torch.dtype) -> nn.Module:
    """A module of named inputs around a text model, with the outputs that a denoiser reads.

    Args:
        encoder: whose weights have the types of ``facts``.
        facts: of :func:`encoder_facts`.
        outer: type of the outputs.
    """
    if facts.class_name in _T5:
        return _T5Encoder(encoder, facts, outer)
    return _ClipEncoder(encoder, facts, outer)


class _ClipEncoder(nn.Module):
    def __init__(self, encoder: nn.Module, facts: CompanionFacts, outer: torch.dtype) -> None:
        super().__init__()
        self.network = encoder
        self._layer, self._pooled, self._outer = facts.hidden_layer, facts.pooled, outer

    def forward(self, inputs: dict[str, Tensor], *, convert: bool = True) -> tuple[Tensor, ...]:
        result = self.network(inputs["input_ids"], output_hidden_states=self._layer == -2)
        values = []
        if self._layer is not None:  # -1 is behind the final norm; earlier layers are read in front of it
            values.append(result.last_hidden_state if self._layer == -1 else result.hidden_states[self._layer])
        if self._pooled is not None:
            values.append(getattr(result, self._pooled))
        return tuple(value.to(self._outer) if convert else value for value in values)


class _T5Encoder(nn.Module):
    """T5 with an FP32 residual stream, and with the buckets of relative positions as a table.

    transformers computes the buckets with a logarithm, whose last bit decides at powers of two; no two runtimes need to
    agree on it.
    """

    buckets: Tensor

    def __init__(self, encoder: nn.Module, facts: CompanionFacts, outer: torch.dtype) -> None:
        super().__init__()
        self.network, self._outer = encoder, outer
        most = facts.io.inputs[0].dims[1].high + 1  # torch.export takes a slice of all for a size that cannot change
        attention = cast("Any", encoder.get_submodule("encoder.block.0.layer.0.SelfAttention"))
        self.register_buffer("buckets", _buckets(attention, most), persistent=False)

        def bias(queries: int, keys: int, **_: Any) -> Tensor:
            values: Tensor = attention.relative_attention_bias(self.buckets[:queries, :keys])
            return values.permute(2, 0, 1).unsqueeze(0)

        attention.compute_bias = bias  # of this object alone

    def forward(self, inputs: dict[str, Tensor], *, convert: bool = True) -> tuple[Tensor, ...]:
        network = cast("Any", self.network)
        embedded = network.shared(inputs["input_ids"])
        mask = inputs.get("attention_mask")
        result = network(
            # FP32 as it would be behind the first `wo`: so no sum of the stream is clamped to FP16's range
            inputs_embeds=embedded.float(),
            attention_mask=_additive(mask, embedded.dtype),
        )
        hidden = result.last_hidden_state
        return (hidden.to(self._outer) if convert else hidden,)


def _buckets(attention: Any, most: int) -> Tensor:
    """The bucket of every pair of a query and a key, INT32 ``[most, most]``."""
    position = torch.arange(most)
    buckets: Tensor = attention._relative_position_bucket(
        position[None, :] - position[:, None],
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return buckets.to(torch.int32)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to the scores ``[N, heads, queries, keys]``: the most negative number at padding.

    Without a mask a zero: transformers would make one of the stream's type, which is not the scores'.
    """
    zero = torch.zeros((1, 1, 1, 1), dtype=dtype)
    if mask is None:
        return zero
    return torch.where(mask[:, None, None, :] == 0, torch.full_like(zero, torch.finfo(dtype).min), zero)


def _readings(loaded: LoadedModel) -> Mapping[CompanionName, _Reading]:
    family = family_of(loaded.denoiser)
    return _xl_readings(loaded) if _is_xl(loaded) else _READINGS.get(family, {})


def _xl_readings(loaded: LoadedModel) -> dict[CompanionName, _Reading]:
    """SDXL has two encoders; its refiner the second alone, which then gives all text."""
    names: tuple[CompanionName, ...] = ("text_encoder", "text_encoder_2")
    both = all(getattr(loaded.pipeline, name, None) is not None for name in names)
    then = "the denoiser reads encoder_hidden_states_1 and _2 concatenated along the last axis" if both else ""
    return {
        name: _Reading(
            classes=_CLIP,
            layer=-2,
            pooled="text_embeds" if hasattr(getattr(loaded.pipeline, name, None), "text_projection") else None,
            suffix=f"_{number}" if both else "",
            then=then,
        )
        for number, name in enumerate(names, 1)
    }


def _is_xl(loaded: LoadedModel) -> bool:
    return bool(config_of(loaded.denoiser).get("addition_embed_type") == "text_time")


def _tokens(loaded: LoadedModel, name: CompanionName, encoder: Any, tokens: Dim) -> Dim:
    """How many tokens an encoder reads, where the denoiser reads ``tokens``."""
    clip = clip_tokens(loaded.pipeline)
    family = family_of(loaded.denoiser)
    if family == SD3 and name == "text_encoder_3":
        check_text_length(loaded.denoiser, loaded.pipeline, tokens)
        ends = {end: getattr(tokens, end) - clip for end in ("low", "best", "high")}
        return tokens.model_copy(update=ends)
    if family in (SD3, FLUX) and type(encoder).__name__ in _CLIP:
        tokens = _fixed(clip)
    most = getattr(encoder.config, "max_position_embeddings", None)
    if most is not None and tokens.high > most:
        raise ModelError(f"the {name} reads {most} tokens at most, and shapes.tokens is {tokens.high}")
    return tokens


def _floats(name: str, role: Role, dtype: str, dims: tuple[Dim, ...]) -> TensorSpec:
    return TensorSpec(name=name, role=role, dtype=cast("Any", dtype), dims=dims)


def _fixed(size: int) -> Dim:
    return Dim(low=size, best=size, high=size)
