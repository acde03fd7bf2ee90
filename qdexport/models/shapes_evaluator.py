"""Judges pictures of the shapes models: are they what the caption asked for, and how far from real ones?

The evaluator is a small convolutional network trained with the shapes model on the same drawings. Six heads
read the attributes of a picture (`qdexport.models.shapes.Attributes.labels` has their order); the 64 numbers
before the heads are the features of the Frechet distance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from qdexport.core.reading import reading
from qdexport.errors import ModelError
from qdexport.models.shapes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    LAYOUTS,
    SHAPES,
    bundled_model_path,
    captions,
    parse_caption,
    real_images,
)

__all__ = [
    "FEATURES",
    "ShapesEvaluator",
    "frechet_distance",
    "label_tensor",
    "load_evaluator",
    "real_features",
    "to_network_range",
]

FEATURES: Final = 64
_BATCH: Final = 256


class ShapesEvaluator(nn.Module):
    """Reads layout, background, and the colours and shapes of up to two things off a picture.

    All methods take pictures as float32 [N, 3, 32, 32], RGB in [-1, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(1024, FEATURES),
            nn.ReLU(),
        )
        classes = (len(LAYOUTS), len(BACKGROUNDS), len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES))
        self.heads = nn.ModuleList(nn.Linear(FEATURES, count) for count in classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits of the six heads, each [N, classes]; with gradients, for training."""
        hidden = self.conv(images)
        return [head(hidden) for head in self.heads]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The Frechet features, float32 [N, 64].

        Raises:
            ModelError: The pictures are not [N, 3, 32, 32], or not finite.
        """
        _check_images(images)
        return torch.cat([self.conv(part) for part in torch.split(images, _BATCH)])

    def correct_heads(self, images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Which heads read what the captions ask for, and which heads count.

        Returns:
            Two bool tensors [N, 6]; with one thing in the picture the last two heads do not count.

        Raises:
            ModelError: A caption is not of the grammar, the numbers of pictures and captions differ, or the
                pictures are malformed.
        """
        if len(images) != len(texts):
            raise ModelError(
                f"{len(images)} pictures for {len(texts)} captions; pass one caption per picture"
            )
        hidden = self.features(images)
        with torch.no_grad():
            read = torch.stack([head(hidden).argmax(1) for head in self.heads], dim=1)
        wanted = label_tensor(texts).to(read.device)
        return read == wanted, wanted >= 0

    def aligned(self, images: Tensor, texts: list[str]) -> Tensor:
        """Whether every head that counts is right, bool [N]; errors as in `correct_heads`."""
        right, counts = self.correct_heads(images, texts)
        return (right | ~counts).all(dim=1)

    def alignment(self, images: Tensor, texts: list[str]) -> float:
        """Share of aligned pictures, 0 to 1; errors as in `correct_heads`."""
        return float(self.aligned(images, texts).double().mean())

    def attribute_accuracy(self, images: Tensor, texts: list[str]) -> float:
        """Share of right heads among those that count, 0 to 1; errors as in `correct_heads`."""
        right, counts = self.correct_heads(images, texts)
        return float(right[counts].double().mean())


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ModelError(
            f"the shapes evaluator reads pictures of shape [N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], "
            f"got {list(images.shape)}"
        )
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(1).sum())
        raise ModelError(f"{bad} of {len(images)} pictures hold values that are not finite")


def label_tensor(texts: list[str]) -> Tensor:
    """Class numbers that captions ask for, int64 [N, 6], -1 where a head does not count.

    Raises:
        ModelError: A caption is not of the grammar.
    """
    return torch.tensor([parse_caption(text).labels() for text in texts], dtype=torch.int64).reshape(-1, 6)


def load_evaluator(folder: Path | None = None) -> ShapesEvaluator:
    """Loads the evaluator of a shapes model folder, in eval mode.

    Args:
        folder: A folder with `evaluator/model.safetensors`; the bundled `shapes` when None.

    Raises:
        ModelError: The file is missing, unreadable, or does not hold exactly the evaluator's weights.
    """
    path = (folder or bundled_model_path("shapes")) / "evaluator" / "model.safetensors"
    if not path.is_file():
        raise ModelError(f"no evaluator at {path}; only shapes models carry one")
    evaluator = ShapesEvaluator()
    with reading(path, ModelError, what="does not hold the weights of the shapes evaluator"):
        evaluator.load_state_dict(load_file(path), strict=True)
    return evaluator.requires_grad_(False).eval()


def to_network_range(pictures: NDArray[np.uint8]) -> Tensor:
    """Turns uint8 pictures [N, H, W, 3] into float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def real_features(count: int, seed: int, evaluator: ShapesEvaluator | None = None) -> NDArray[np.float32]:
    """Features of freshly drawn pictures of random captions: the real side of a Frechet distance.

    About 0.5 ms a picture; callers that compare many sets keep the result.

    Args:
        count: Number of pictures.
        seed: Chooses captions and pictures.
        evaluator: The bundled one when None.

    Returns:
        float32, [count, 64].
    """
    pictures = real_images(captions(count, seed), seed)
    network = evaluator or load_evaluator()
    features: NDArray[np.float32] = network.features(to_network_range(pictures)).numpy()
    return features


def frechet_distance(features_a: NDArray[np.floating], features_b: NDArray[np.floating]) -> float:
    r"""Frechet distance of two sets of features, each taken as a Gaussian (Heusel et al. 2017, eq. 6).

    d^2 = |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)), in float64, with unbiased covariances.
    The last trace is the sum of the square roots of the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2),
    which has the eigenvalues of C_a C_b and needs no general matrix root, so singular covariances are fine.
    Small sets bias the distance upwards: compare equal counts only.

    Args:
        features_a: [N, F], N >= 2.
        features_b: [M, F], M >= 2.

    Raises:
        ModelError: A set has fewer than two rows, the widths differ, or a value is not finite.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ModelError(
            f"a Frechet distance needs two sets [N >= 2, F] of equal width, got {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ModelError("a Frechet distance needs finite features; one of the sets holds inf or NaN")
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cov_a, cov_b = np.atleast_2d(cov_a), np.atleast_2d(cov_b)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    shift = a.mean(axis=0) - b.mean(axis=0)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2.0 * np.sqrt(np.clip(cross, 0.0, None)).sum()
    return float(max(shift @ shift + trace, 0.0))
