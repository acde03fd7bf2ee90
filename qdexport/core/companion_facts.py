"""What an exported network beside the denoiser says about itself, stored in its ONNX file's metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from qdexport.core.io_spec import IoSpec
from qdexport.core.precision import Body
from qdexport.core.reading import reading
from qdexport.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["COMPANION_KEY", "COMPANION_NAMES", "CompanionFacts", "CompanionName"]

CompanionName = Literal["vae_decoder", "text_encoder", "text_encoder_2", "text_encoder_3"]
COMPANION_NAMES: tuple[CompanionName, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae_decoder")
COMPANION_KEY = "qdexport.companion"


class CompanionFacts(BaseModel):
    """Facts that whoever runs the network needs.

    Attributes:
        network: name of the network, and of its folder.
        component: name of the part of the diffusers pipeline that it computes.
        class_name: class of that part.
        model: name of the model.
        target: target it was lowered for.
        body: type that it computes in; inputs and outputs have the denoiser's.
        why_body: what decided it.
        io: inputs and outputs.
        usage: how its inputs are made, and what its outputs are, in one sentence each.
        wide_modules: modules that compute in FP32 in an FP16 body too, by the last part of their path.
        hidden_layer: of a text encoder: which hidden states are its output, -1 (behind the final norm) or -2 (the last
            but one, without it); None for others, and where the denoiser reads none.
        pooled: of a text encoder: which pooled text is its last output, by the name that transformers gives it; None
            where the denoiser reads none.
        scaling_factor: of a VAE: ``latents`` are the sampler's, divided by this number; None for others.
        shift_factor: of a VAE: added after the division; None where there is none.
        latents_mean: of a VAE, by channel; None where there is none.
        latents_std: of a VAE, by channel; None where there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: CompanionName
    component: str
    class_name: str
    model: str
    target: str
    body: Body
    why_body: str
    io: IoSpec
    usage: str
    wide_modules: tuple[str, ...] = ()
    hidden_layer: Literal[-1, -2] | None = None
    pooled: Literal["text_embeds", "pooler_output"] | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def body_of(self, layer: str) -> Body:
        """The type that a layer computes in, by its module path."""
        return "fp32" if layer.rpartition(".")[2] in self.wide_modules else self.body

    def to_metadata(self) -> dict[str, str]:
        """The metadata of the ONNX file."""
        return {COMPANION_KEY: self.model_dump_json()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], source: str) -> CompanionFacts:
        """Reads what :meth:`to_metadata` wrote. Raises ``ModelError`` for an ONNX file from elsewhere."""
        text = metadata.get(COMPANION_KEY)
        if text is None:
            raise ModelError(f"{source} is no text encoder and no VAE decoder that qdexport wrote")
        with reading(source, ModelError, "export it again", what="holds facts that this qdexport cannot read"):
            return cls.model_validate_json(text)
