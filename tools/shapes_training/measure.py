"""Quality of a shapes model: are its pictures what the captions say, and do they look like real ones?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qdexport.errors import ModelError
from qdexport.models.shapes import IMAGE_SIZE, captions
from qdexport.models.shapes_evaluator import frechet_distance, load_evaluator, real_features

if TYPE_CHECKING:
    from qdexport.core.progress import ProgressSink

__all__ = ["Sampling", "measure_model"]

_BATCH = 64
# pictures of captions(256, 0) are compared with real ones of other captions
_REAL_SEED_OFFSET = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How pictures are sampled.

    Attributes:
        images: Number of pictures.
        steps: Denoiser calls of each.
        guidance: Classifier-free guidance; 1 is none.
        seed: Chooses captions and noise.
    """

    images: int
    steps: int
    guidance: float
    seed: int


def measure_model(folder: Path, sampling: Sampling, real: int, progress: ProgressSink) -> dict[str, float]:
    """Samples a model folder and judges the pictures with its own evaluator.

    Args:
        folder: A shapes model.
        sampling: What to sample.
        real: Number of real pictures for the Frechet distance.
        progress: Shows one bar.

    Returns:
        `alignment` and `attributes` (0 to 1), and `frechet` (small samples are biased upwards).

    Raises:
        ModelError: The folder is not a shapes model.
    """
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(folder)
    except OSError as error:
        raise ModelError(f"{folder} is not a shapes model: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    evaluator = load_evaluator(folder)
    texts = captions(sampling.images, sampling.seed)
    source = torch.Generator().manual_seed(sampling.seed)
    parts = []
    with progress.track(len(texts), "sampling") as advance:
        for first in range(0, len(texts), _BATCH):
            part = texts[first : first + _BATCH]
            pictures = pipeline(
                part,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance,
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
                generator=source,
                output_type="pt",
            ).images
            parts.append(pictures.mul(2.0).sub(1.0))
            advance(len(part))
    pictures = torch.cat(parts)
    features = evaluator.features(pictures).numpy()
    return {
        "alignment": evaluator.alignment(pictures, texts),
        "attributes": evaluator.attribute_accuracy(pictures, texts),
        "frechet": frechet_distance(features, real_features(real, sampling.seed + _REAL_SEED_OFFSET, evaluator)),
    }
