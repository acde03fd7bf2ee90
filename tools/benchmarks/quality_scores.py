"""Scores of one row of the quality table, their bootstrap intervals, and paired differences between rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from benchmarks.quality_rows import Metric
    from qdexport.models.shapes_evaluator import ShapesEvaluator

    Array = NDArray[np.float64]

__all__ = [
    "PEAK",
    "Estimate",
    "Moments",
    "Readings",
    "Scored",
    "estimate",
    "frechet",
    "moments",
    "paired_difference",
    "paired_ratio",
    "read_images",
    "score_images",
]

PEAK: Final = 2.0  # images lie in [-1, 1]
_EQUAL_DB: Final = 999.0  # equal images have no finite PSNR, and JSON has no infinity
_RESAMPLES: Final = 1000
_FRECHET_RESAMPLES: Final = 200
_FRECHET: Final = ("frechet_fp", "frechet_real")
_LEVEL: Final = (2.5, 97.5)  # percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its bootstrap 95 % interval, over `images` images."""

    value: float
    low: float
    high: float
    images: int

    @property
    def holds_zero(self) -> bool:
        """Whether a difference is not measurable: its interval contains 0."""
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Mean ``[F]`` and covariance ``[F, F]`` of a set of features."""

    mean: Array
    covariance: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """What the evaluator reads off images.

    Attributes:
        features: ``[N, F]``, for the Frechet distance.
        aligned: 0 or 1 per image: everything is as the prompt asks.
        right: per image, how many attributes are.
        counted: per image, how many are asked for.
    """

    features: Array
    aligned: Array
    right: Array
    counted: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One row beside its reference (the floating-point model, same prompts and noise), image by image.

    Attributes:
        mse: ``[N]`` mean squared error of each image on [-1, 1]; zeros for the reference itself.
        ssim: ``[N]``.
        readings: of the row; None where no evaluator knows the model's images.
        reference: of the reference.
        real: of real images.
    """

    mse: Array
    ssim: Array
    readings: Readings | None = None
    reference: Readings | None = None
    real: Moments | None = None

    def __len__(self) -> int:
        return len(self.mse)


def score_images(images: NDArray[np.float32], reference: NDArray[np.float32]) -> tuple[Array, Array]:
    """Mean squared error and SSIM per image, float64 ``[N]`` each.

    Args:
        images: FP32 ``[N, C, H, W]`` in [-1, 1].
        reference: of the same prompts and noise.
    """
    a, b = torch.from_numpy(images), torch.from_numpy(reference)
    mse = ((a.double() - b.double()) ** 2).mean(dim=(1, 2, 3)).numpy()
    ssim = structural_similarity_index_measure(a, b, data_range=PEAK, reduction="none")
    return mse, ssim.double().reshape(len(mse)).numpy()


def read_images(images: NDArray[np.float32], prompts: Sequence[str], evaluator: ShapesEvaluator) -> Readings:
    """Shows images to the evaluator."""
    tensor = torch.from_numpy(images)
    right, counts = evaluator.correct_heads(tensor, list(prompts))
    return Readings(
        features=evaluator.features(tensor).double().numpy(),
        aligned=(right | ~counts).all(dim=1).double().numpy(),
        right=(right & counts).sum(dim=1).double().numpy(),
        counted=counts.sum(dim=1).double().numpy(),
    )


def moments(features: Array) -> Moments:
    """Mean and covariance of features ``[N >= 2, F]``."""
    return Moments(mean=features.mean(axis=0), covariance=np.cov(features, rowvar=False))


def frechet(a: Moments, b: Moments) -> float:
    """The Frechet distance of two Gaussians: ``|m - n|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)``.

    Equal to ``qdexport.models.shapes_evaluator.frechet_distance`` of the features, which knows no moments; here one
    side is met hundreds of times.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    shift = a.mean - b.mean
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * np.sqrt(np.clip(cross, 0.0, None)).sum()
    return float(max(shift @ shift + spread, 0.0))


def estimate(scored: Scored, metric: Metric, images: int | None = None) -> Estimate | None:
    """A metric of one row and its interval, over the first `images` images; None where it does not exist.

    The interval is that of resampled images. Resampling makes a set less varied, which shifts a Frechet distance;
    its interval is moved back by that shift (the mean of the resampled distances less the distance).
    """
    count = len(scored) if images is None else min(images, len(scored))
    function = _function(scored, metric)
    if function is None or count < 2:
        return None
    found = _interval(function, metric, count)
    return replace(found, low=max(found.low, 0.0)) if metric in _FRECHET else found  # moved back, but never below 0


def paired_difference(row_a: Scored, row_b: Scored, metric: Metric, images: int | None = None) -> Estimate | None:
    """The difference ``a - b`` of a metric between two rows of the same prompts and noise, and its interval.

    Each resample draws the same images of both rows, so what makes prompts hard or easy cancels. Over the first
    `images` images, as far as both rows have them.
    """
    pair = _both(row_a, row_b, metric, images)
    if pair is None:
        return None
    first, second, count = pair
    return _interval(lambda index: first(index) - second(index), metric, count)


def paired_ratio(row_a: Scored, row_b: Scored, metric: Metric, images: int | None = None) -> Estimate | None:
    """The ratio ``a / b`` of a metric, as :func:`paired_difference`; None where ``b`` is 0."""
    pair = _both(row_a, row_b, metric, images)
    if pair is None:
        return None
    first, second, count = pair
    if not second(np.arange(count)) > 0:
        return None
    return _interval(lambda index: first(index) / second(index), metric, count)


def _both(
    row_a: Scored, row_b: Scored, metric: Metric, images: int | None
) -> tuple[_Statistic, _Statistic, int] | None:
    first, second = _function(row_a, metric), _function(row_b, metric)
    count = min(len(row_a), len(row_b), len(row_a) if images is None else images)
    return None if first is None or second is None or count < 2 else (first, second, count)


_Statistic = Callable[["NDArray[np.int64]"], float]


def _interval(function: _Statistic, metric: Metric, count: int) -> Estimate:
    value = function(np.arange(count))
    resamples = _FRECHET_RESAMPLES if metric in _FRECHET else _RESAMPLES
    source = np.random.default_rng(0)  # equal resamples for all rows
    drawn = np.array([function(source.integers(count, size=count)) for _ in range(resamples)])
    if metric in _FRECHET:
        drawn += value - drawn.mean()
    low, high = (float(end) for end in np.percentile(drawn, _LEVEL))
    return Estimate(value=value, low=low, high=high, images=count)


def _function(scored: Scored, metric: Metric) -> _Statistic | None:
    """The metric as a function of the images that count."""
    if metric == "mse":
        return lambda index: float(scored.mse[index].mean())
    if metric == "psnr_db":
        return lambda index: _psnr(float(scored.mse[index].mean()))
    if metric == "ssim":
        return lambda index: float(scored.ssim[index].mean())
    if scored.readings is None:
        return None
    return _of_readings(scored, scored.readings, metric)


def _of_readings(scored: Scored, read: Readings, metric: Metric) -> _Statistic | None:
    if metric == "alignment":
        return lambda index: float(read.aligned[index].mean())
    if metric == "attributes":
        return lambda index: float(read.right[index].sum() / read.counted[index].sum())
    if metric == "frechet_real":
        real = scored.real
        return None if real is None else lambda index: frechet(real, moments(read.features[index]))
    other = scored.reference
    if other is None:
        return None
    return lambda index: frechet(moments(other.features[index]), moments(read.features[index]))


def _psnr(mse: float) -> float:
    return float(10 * np.log10(PEAK**2 / mse)) if mse > 0 else _EQUAL_DB
