"""The networks beside the denoiser: the VAE's decoder and the text encoders, ready to be exported.

Their inputs and outputs are named, and have the denoiser's floating-point type, so that what one network gives is what
the next one takes:

    input_ids [N, L] int64 -> text_encoder -> encoder_hidden_states [N, L, D]         (SD 1.x, 2.x: last hidden state)
    input_ids -> text_encoder, text_encoder_2 -> encoder_hidden_states_1, encoder_hidden_states_2, text_embeds
                                            (SDXL: last but one hidden states, to be concatenated, and the pooled text)
    latents [N, C, H, W] -> vae_decoder -> image [N, 3, f H, f W], values in [-1, 1], not clipped

``latents`` are what ``vae.decode`` of diffusers takes: the sampler's, divided by the VAE's ``scaling_factor``. The
file's metadata has the factor.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn

from qdexport.core.companion_facts import COMPANION_NAMES, CompanionFacts, CompanionName
from qdexport.core.io_spec import Dim, IoSpec, TensorSpec
from qdexport.core.recipe import Companions
from qdexport.errors import ModelError
from qdexport.models.library_logs import quiet_libraries
from qdexport.models.loaded import LoadedModel
from qdexport.models.weights import check_weights, find_weights, read_json, variants_in

__all__ = [
    "NETWORK",
    "Companion",
    "Found",
    "companion_facts",
    "companion_of",
    "example_companion_inputs",
    "find_companions",
    "load_companion",
]

logger = logging.getLogger(__name__)

Body = Literal["fp32", "fp16"]
NETWORK: Final = "network"  # where a Companion's module holds the network itself
_DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16}
_COMPONENTS: Final[dict[CompanionName, str]] = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "vae_decoder": "vae",
}
_VAES: Final = ("AutoencoderKL", "AutoencoderTiny")
_ENCODERS: Final = ("CLIPTextModel", "CLIPTextModelWithProjection")
_LIBRARY_ERRORS: Final = (ValueError, OSError, RuntimeError, TypeError, KeyError, AttributeError, ImportError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Which networks are compiled beside the denoiser, and a sentence for each that is there and is not."""

    names: tuple[CompanionName, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """One network beside the denoiser.

    Attributes:
        facts: what its ONNX file will say.
        module: takes the named inputs as one dictionary and returns the outputs in order; computes in ``facts.body``,
            and holds the network as ``network``.
    """

    facts: CompanionFacts
    module: nn.Module

    @property
    def network(self) -> nn.Module:
        """The network, whose module paths name the nodes."""
        return self.module.get_submodule(NETWORK)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The named outputs."""
        outputs = self.module(dict(inputs))
        return {spec.name: output for spec, output in zip(self.facts.io.outputs, outputs, strict=True)}

    def in_body(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The named outputs in the type that the network computes in, before they get the denoiser's."""
        outputs = self.module(dict(inputs), convert=False)
        return {spec.name: output for spec, output in zip(self.facts.io.outputs, outputs, strict=True)}


def find_companions(loaded: LoadedModel, wanted: Companions) -> Found:
    """Looks for the networks that a recipe asks for.

    Args:
        loaded: the model; without a pipeline it has none.
        wanted: of the recipe.

    Raises:
        ModelError: one that the recipe names is not there, or is not of a kind that qdexport compiles.
    """
    if wanted.networks == "none":
        return Found(names=(), notes=())
    if wanted.networks != "auto":
        for name in wanted.networks:
            reason = _why_not(loaded, name)
            if reason:
                raise ModelError(f"companions.networks asks for {name}, but {reason}; remove it, or say `auto`")
        return Found(names=tuple(name for name in COMPANION_NAMES if name in wanted.networks), notes=())
    reasons = {name: _why_not(loaded, name) for name in COMPANION_NAMES if _part(loaded, name) is not None}
    return Found(
        names=tuple(name for name, reason in reasons.items() if not reason),
        notes=tuple(f"The {name} is not compiled: {reason}." for name, reason in reasons.items() if reason),
    )


def companion_facts(
    loaded: LoadedModel, name: CompanionName, denoiser: IoSpec, body: Literal["auto", "fp32", "fp16"], target: str
) -> CompanionFacts:
    """Names, shapes and types of one network's inputs and outputs, and the type that it computes in.

    Args:
        loaded: the model, which has the network (:func:`find_companions`).
        name: of the network.
        denoiser: inputs and outputs of the exported denoiser: its sizes decide, its floating-point type is taken over.
            The networks beside it see one row per image, where guidance gives the denoiser two.
        body: of the recipe.
        target: name of the target.

    Raises:
        ModelError: the text is longer than the encoder allows.
    """
    part = _part(loaded, name)
    rows = denoiser.inputs[0].dims[0]
    images = _per_image(rows) if loaded.defaults.cfg else rows.model_copy(update={"name": "images"})
    chosen, why = _body(loaded, name, body)
    common = {
        "network": name,
        "component": _COMPONENTS[name],
        "class_name": type(part).__name__,
        "model": loaded.name,
        "target": target,
        "body": chosen,
        "why_body": why,
    }
    if name == "vae_decoder":
        return CompanionFacts(**common, **_vae_facts(loaded, images, denoiser))
    return CompanionFacts(**common, **_encoder_facts(loaded, name, images, denoiser))


def load_companion(folder: Path, facts: CompanionFacts, variant: str | None = None) -> Companion:
    """Reads one network's weights and puts it into the type that it is compiled in.

    Args:
        folder: of the pipeline.
        facts: of :func:`companion_facts`.
        variant: of the weight files; the plain ones are taken where there are none of it.

    Raises:
        ModelError: files are missing, damaged, or do not fit the configuration.
    """
    part = folder / facts.component
    read_json(part / "config.json")
    variant = variant if variant in variants_in(part) else None
    weights = find_weights(part, variant)
    check_weights(weights)
    try:
        with quiet_libraries():
            network, info = _class(facts.class_name).from_pretrained(
                part,
                variant=variant,
                dtype=_DTYPES[facts.body],
                use_safetensors=not weights.pickled,
                low_cpu_mem_usage=True,
                local_files_only=True,
                output_loading_info=True,
                # attention written out: each of its operators is one of the graph's, and needs no guard for empty rows
                **({} if facts.network == "vae_decoder" else {"attn_implementation": "eager"}),
            )
    except _LIBRARY_ERRORS as error:
        raise ModelError(f"{part} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(f"{weights.files[0]} lacks {len(missing)} weights of the config, for instance {missing[0]!r}")
    return companion_of(network, facts)


def companion_of(network: nn.Module, facts: CompanionFacts) -> Companion:
    """Wraps an AutoencoderKL, an AutoencoderTiny or a CLIP text model, which has the type of ``facts.body`` by then."""
    network = network.eval().requires_grad_(requires_grad=False)
    dtypes = (_DTYPES[facts.body], getattr(torch, facts.io.outputs[0].dtype))
    if facts.network == "vae_decoder":
        module: nn.Module = _VaeDecoder(network, *dtypes)
    else:
        module = _TextEncoder(network, facts, dtypes[1])
    return Companion(facts=facts, module=module.eval())


def example_companion_inputs(companion: Companion, seed: int) -> dict[str, Tensor]:
    """Random inputs: normal latents, legal tokens.

    They have the best sizes; a range whose best is 1 has 2 rows (torch.export takes a 1 for a constant).

    Args:
        companion: the network.
        seed: equal seeds give equal numbers.
    """
    source = torch.Generator().manual_seed(seed)
    inputs = {}
    for spec in companion.facts.io.inputs:
        shape = tuple(max(dim.best, 2) if dim.dynamic else dim.best for dim in spec.dims)
        if spec.role == "tokens":
            words = int(cast("Any", companion.network).config.vocab_size)
            inputs[spec.name] = torch.randint(0, words, shape, generator=source)
        else:
            inputs[spec.name] = torch.randn(shape, generator=source).to(getattr(torch, spec.dtype))
    return inputs


class _Decoder(nn.Module):
    """What ``vae.decode`` computes: the decoder, and the convolution in front of it where there is one."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)
        self.decoder = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        image: Tensor = self.decoder(latents)
        return image


class _VaeDecoder(nn.Module):
    def __init__(self, vae: nn.Module, body: torch.dtype, outer: torch.dtype) -> None:
        super().__init__()
        self.network = _Decoder(vae)
        self._body, self._outer = body, outer

    def forward(self, inputs: dict[str, Tensor], *, convert: bool = True) -> tuple[Tensor, ...]:
        image = self.network(inputs["latents"].to(self._body))
        return (image.to(self._outer) if convert else image,)


class _TextEncoder(nn.Module):
    """A CLIP text model with the outputs that a denoiser reads."""

    def __init__(self, encoder: nn.Module, facts: CompanionFacts, outer: torch.dtype) -> None:
        super().__init__()
        self.network = encoder
        self._layer, self._pooled, self._outer = facts.hidden_layer, len(facts.io.outputs) > 1, outer

    def forward(self, inputs: dict[str, Tensor], *, convert: bool = True) -> tuple[Tensor, ...]:
        last = self._layer in {None, -1}  # behind the final norm; earlier layers are read in front of it
        result = self.network(inputs["input_ids"], output_hidden_states=not last)
        hidden = result.last_hidden_state if last else result.hidden_states[self._layer]
        # [0] of a model with a projection is the projected pooled text
        values = [hidden, result[0]] if self._pooled else [hidden]
        return tuple(value.to(self._outer) if convert else value for value in values)


def _part(loaded: LoadedModel, name: CompanionName) -> Any | None:
    return getattr(loaded.pipeline, _COMPONENTS[name], None)


def _class(name: str) -> Any:
    import diffusers
    import transformers

    return getattr(diffusers if name in _VAES else transformers, name)


def _why_not(loaded: LoadedModel, name: CompanionName) -> str:
    """Why a network cannot be compiled; empty when it can."""
    part = _part(loaded, name)
    if part is None:
        return f"the model {loaded.name} has no {_COMPONENTS[name]}"
    known = _VAES if name == "vae_decoder" else _ENCODERS
    if type(part).__name__ not in known:
        return f"its class is {type(part).__name__}, and qdexport compiles {' and '.join(known)}"
    if name == "vae_decoder":
        return ""
    if "encoder_hidden_states" not in _denoiser_parameters(loaded):
        return "the denoiser reads no text"
    if getattr(part.config, "use_attention_mask", False):
        return "it reads an attention mask (use_attention_mask), which has no input in the exported network"
    if name == "text_encoder_2" and not _is_xl(loaded):
        return "the denoiser is not of SDXL's kind (addition_embed_type text_time), so what it reads is not known"
    return ""


def _denoiser_parameters(loaded: LoadedModel) -> Mapping[str, Any]:
    import inspect

    return inspect.signature(type(loaded.denoiser).forward).parameters


def _is_xl(loaded: LoadedModel) -> bool:
    return bool(cast("Any", loaded.denoiser).config.get("addition_embed_type") == "text_time")


def _body(loaded: LoadedModel, name: CompanionName, asked: str) -> tuple[Body, str]:
    if asked != "auto":
        return cast("Body", asked), "companions.body of the recipe"
    part = _part(loaded, name)
    # only SDXL's pipelines heed the entry, which is true by default
    if name == "vae_decoder" and hasattr(loaded.pipeline, "upcast_vae") and part.config.get("force_upcast"):  # type: ignore[union-attr]
        return "fp32", (
            f"the VAE's config says force_upcast: its activations overflow fp16, and {type(loaded.pipeline).__name__} "
            "decodes in fp32 too"
        )
    return "fp16", "fp16 unless something speaks against it"


def _per_image(rows: Dim) -> Dim:
    """One row per image, where the denoiser has two."""
    return Dim(name="images", **{end: max(1, getattr(rows, end) // 2) for end in ("low", "best", "high")})


def _vae_facts(loaded: LoadedModel, images: Dim, denoiser: IoSpec) -> dict[str, Any]:
    config = cast("Any", loaded.pipeline).vae.config
    dtype, (_, _, height, width) = denoiser.inputs[0].dtype, denoiser.inputs[0].dims
    factor = int(cast("Any", loaded.pipeline).vae_scale_factor)
    latents = (images, _fixed(int(config["latent_channels"])), height, width)
    image = (images, _fixed(int(config["out_channels"])), _times(height, factor), _times(width, factor))
    means, deviations = config.get("latents_mean"), config.get("latents_std")
    return {
        "io": IoSpec(
            inputs=(TensorSpec(name="latents", role="latents", dtype=dtype, dims=latents),),
            outputs=(TensorSpec(name="image", role="image", dtype=dtype, dims=image),),
        ),
        "usage": (
            "latents: the sampler's, divided by scaling_factor, as vae.decode of diffusers takes them; "
            "image: RGB in [-1, 1], not clipped"
        ),
        "scaling_factor": float(config["scaling_factor"]),
        "shift_factor": config.get("shift_factor"),
        "latents_mean": None if means is None else tuple(means),
        "latents_std": None if deviations is None else tuple(deviations),
    }


def _encoder_facts(loaded: LoadedModel, name: CompanionName, images: Dim, denoiser: IoSpec) -> dict[str, Any]:
    encoder = cast("Any", _part(loaded, name))
    text = denoiser.by_role("text")
    if text is None:
        raise ModelError(f"the {name} has no reader: the exported denoiser has no text input")
    tokens = text.dims[1]
    most = int(encoder.config.max_position_embeddings)
    if tokens.high > most:
        raise ModelError(f"the {name} reads {most} tokens at most, and shapes.tokens is {tokens.high}")
    both = all(_part(loaded, other) is not None for other in ("text_encoder", "text_encoder_2"))
    number = ("_1" if name == "text_encoder" else "_2") if _is_xl(loaded) and both else ""
    hidden = (images, tokens, _fixed(int(encoder.config.hidden_size)))
    outputs = [TensorSpec(name=f"encoder_hidden_states{number}", role="text", dtype=text.dtype, dims=hidden)]
    usage = "input_ids: of the tokenizer, padded to the full length; encoder_hidden_states"
    usage += f"{number}: " + ("the last but one hidden states" if _is_xl(loaded) else "the last hidden states")
    if number:
        usage += "; the denoiser reads encoder_hidden_states_1 and _2 concatenated along the last axis"
    if _is_xl(loaded) and hasattr(encoder, "text_projection"):
        pooled = (images, _fixed(int(encoder.config.projection_dim)))
        outputs.append(TensorSpec(name="text_embeds", role="text_pooled", dtype=text.dtype, dims=pooled))
        usage += "; text_embeds: the projected pooled text"
    ids = TensorSpec(name="input_ids", role="tokens", dtype="int64", dims=(images, tokens))
    io = IoSpec(inputs=(ids,), outputs=tuple(outputs))
    return {"io": io, "usage": usage, "hidden_layer": -2 if _is_xl(loaded) else -1}


def _fixed(size: int) -> Dim:
    return Dim(low=size, best=size, high=size)


def _times(dim: Dim, factor: int) -> Dim:
    """The image's side of a latent side."""
    name = f"{dim.name} of the image" if dim.name else ""
    return Dim(name=name, low=factor * dim.low, best=factor * dim.best, high=factor * dim.high)
