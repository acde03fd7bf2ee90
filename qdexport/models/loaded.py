"""The value that loading a model gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

__all__ = ["LoadedModel", "SamplingDefaults", "WeightsDtype"]

WeightsDtype = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """How a model is usually sampled.

    Attributes:
        steps: Sampler steps.
        guidance_scale: Weight of classifier-free guidance; 1 is none.
        height: Latent rows (pixel rows for a pixel-space model); None when neither config nor pipeline says.
        width: Latent columns, as `height`.
        cfg: Whether the usual guidance doubles the rows of a denoiser call.
        tokens: Text length, where the pipeline can be told one; None for its own.
    """

    steps: int
    guidance_scale: float
    height: int | None
    width: int | None
    cfg: bool
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A denoiser, and its pipeline when the source was a whole one.

    Attributes:
        name: The bundled name, the folder's name, or the hub id.
        folder: Where the files lie; None for a denoiser made in memory.
        pipeline: The diffusers pipeline that holds `denoiser`; None when only a component was loaded.
        denoiser: In eval mode, on the CPU.
        component: Name of the denoiser in its pipeline.
        scheduler: The pipeline's scheduler, or None.
        weights_dtype: Floating-point type of the denoiser's weights in memory.
        evaluator: Weights of the network that reads this model's images, or None.
        defaults: How the model is usually sampled.
        stored_dtype: Type of the weights in their file, before any conversion; None for a denoiser made in
            memory.
        variant: Which weight files were asked for (`fp16`), or None.
    """

    name: str
    folder: Path | None
    pipeline: Any | None
    denoiser: torch.nn.Module
    component: str
    scheduler: Any | None
    weights_dtype: WeightsDtype
    evaluator: Path | None
    defaults: SamplingDefaults
    stored_dtype: WeightsDtype | None = None
    variant: str | None = None
