"""The networks beside the denoiser: the VAE's decoder and the text encoders, ready to be exported.

Their inputs and outputs are named, and have the denoiser's floating-point type, so that what one network gives is what
the next one takes:

    input_ids [N, L] int64 -> text_encoder -> encoder_hidden_states [N, L, D]         (SD 1.x, 2.x: last hidden state)
    input_ids -> text_encoder, text_encoder_2 -> encoder_hidden_states_1, encoder_hidden_states_2, text_embeds
                                            (SDXL: last but one hidden states, to be concatenated, and the pooled text)
    others: see :mod:`qdexport.models.text_encoders`
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
from qdexport.core.precision import Body
from qdexport.core.recipe import Companions, Shapes
from qdexport.errors import ModelError
from qdexport.models.denoiser_io import latent_dims
from qdexport.models.library_logs import quiet_libraries
from qdexport.models.loaded import LoadedModel
from qdexport.models.text_encoders import encoder_facts, text_encoder, why_no_encoder, wide_modules
from qdexport.models.torch_types import torch_dtype
from qdexport.models.weights import check_weights, find_weights, read_json, variants_in

__all__ = [
    "ASKED",
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

ASKED: Final = "companions.body of the recipe"  # why a network has its body, where a recipe says it
NETWORK: Final = "network"  # where a Companion's module holds the network itself
_COMPONENTS: Final[dict[CompanionName, str]] = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
    "vae_decoder": "vae",
}
_VAES: Final = ("AutoencoderKL", "AutoencoderTiny")
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
    loaded: LoadedModel,
    name: CompanionName,
    denoiser: IoSpec,
    body: Literal["auto", "fp32", "fp16"],
    target: str,
    shapes: Shapes,
) -> CompanionFacts:
    """Names, shapes and types of one network's inputs and outputs, and the type that it computes in.

    Args:
        loaded: the model, which has the network (:func:`find_companions`).
        name: of the network.
        denoiser: inputs and outputs of the exported denoiser: its sizes decide, its floating-point type is taken over.
            The networks beside it see one row per image, where guidance gives the denoiser two.
        body: of the recipe.
        target: name of the target.
        shapes: of the recipe, from which the denoiser's inputs were made.

    Raises:
        ModelError: the text is longer than the encoder allows.
    """
    part = _part(loaded, name)
    rows = denoiser.inputs[0].dims[0]
    images = _per_image(rows) if loaded.defaults.cfg else rows.model_copy(update={"name": "images"})
    chosen, why = _body(loaded, name, body)
    common: dict[str, Any] = {
        "network": name,
        "component": _COMPONENTS[name],
        "class_name": type(part).__name__,
        "model": loaded.name,
        "target": target,
        "body": chosen,
        "why_body": why,
    }
    if name == "vae_decoder":
        return CompanionFacts(**common, **_vae_facts(loaded, images, denoiser.inputs[0].dtype, shapes))
    common["wide_modules"] = wide_modules(type(part).__name__, chosen)
    return CompanionFacts(**common, **encoder_facts(loaded, name, part, images, denoiser))


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
                dtype=torch_dtype(facts.body),
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
    """Wraps a VAE or a text model of a class that is compiled, which has the type of ``facts.body`` by then."""
    network = network.eval().requires_grad_(requires_grad=False)
    for path, part in network.named_modules():
        if path.rpartition(".")[2] in facts.wide_modules:
            part.float()
    dtypes = (torch_dtype(facts.body), getattr(torch, facts.io.outputs[0].dtype))
    if facts.network == "vae_decoder":
        module: nn.Module = _VaeDecoder(network, *dtypes)
    else:
        module = text_encoder(network, facts, dtypes[1])
    return Companion(facts=facts, module=module.eval())


def example_companion_inputs(companion: Companion, seed: int) -> dict[str, Tensor]:
    """Random inputs: normal latents, legal tokens, texts of any length where a mask says it.

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
        elif spec.role == "text_mask":
            lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=source)
            inputs[spec.name] = (torch.arange(shape[1]) < lengths).to(torch.int64)
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
    if name != "vae_decoder":
        return why_no_encoder(loaded, name, part)
    if type(part).__name__ not in _VAES:
        return f"its class is {type(part).__name__}, and qdexport compiles {' and '.join(_VAES)}"
    return ""


def _body(loaded: LoadedModel, name: CompanionName, asked: str) -> tuple[Body, str]:
    if asked != "auto":
        return cast("Body", asked), ASKED
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


def _vae_facts(loaded: LoadedModel, images: Dim, dtype: str, shapes: Shapes) -> dict[str, Any]:
    config = cast("Any", loaded.pipeline).vae.config
    height, width = latent_dims(loaded, shapes)
    factor = 2 ** (len(config["block_out_channels"]) - 1)  # not every pipeline says it
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


def _fixed(size: int) -> Dim:
    return Dim(low=size, best=size, high=size)


def _times(dim: Dim, factor: int) -> Dim:
    """The image's side of a latent side."""
    name = f"{dim.name} of the image" if dim.name else ""
    return Dim(name=name, low=factor * dim.low, best=factor * dim.best, high=factor * dim.high)
