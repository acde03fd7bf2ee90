"""Whether pictures have the grain and the contrast of the floating-point model's, all of them taken together.

An error as a share of what another seed makes says little where another seed changes everything, as a background that
no prompt names: pictures full of noise still are closer than another seed's. But no seed adds noise, or takes contrast
away: how much the pixels of a picture differ is the same for all seeds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import stats

from qdexport.core.results import Margin

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["change_of_contrast", "change_of_texture"]

# what one grey level of 256 in [-1, 1] adds to both sides of a ratio, so that a flat ground has one
_GREY: Final = 2 / 255
# of the logarithm: bins a hundredth wide, up to differences of 1000, which latents without a decoder stay below
_EDGES: Final = np.arange(math.log(_GREY), math.log(1000.0), 0.01)
# in groups of ten, since a single level that falls between a ground and its edges would jump by chance
_LEVELS: Final = np.linspace(0.005, 0.995, 100)
_GROUPS: Final = 10
_RESAMPLES: Final = 200


def change_of_texture(
    own: NDArray[np.float32], fp: NDArray[np.float32], limit: float, *, confidence: float = 0.95
) -> Margin | None:
    """The factor by which the differences of neighbouring pixels change, where it is farthest from 1.

    The differences of all pictures are sorted, and their geometric means compared in ten groups of equal size:
    noise makes the small ones larger, lost contrast the large ones smaller. Above 1 is noise or contrast that was not
    there, below 1 is what got lost. The interval is that of drawing the pictures anew, of that group.

    Args:
        own: pictures ``[N, C, H, W]`` of the quantized model, finite.
        fp: of the floating-point model, from the same prompts and noise.
        limit: what the factor is held against: it is to lie between ``1 / limit`` and ``limit``.
        confidence: of the interval.

    Returns:
        The factor; None for pictures of a single pixel.
    """
    counts = [_counts(batch) for batch in (own, fp)]
    if not counts[0].sum():
        return None
    ones = np.ones((1, len(own)))
    ratios = _log_ratios(counts, ones)[0]
    group = int(np.abs(ratios).argmax())
    drawn = np.random.default_rng(0).multinomial(len(own), np.full(len(own), 1 / len(own)), _RESAMPLES).astype(float)
    error = math.inf if len(own) < 2 else float(_log_ratios(counts, drawn)[:, group].std(ddof=1))
    reach = float(stats.norm.ppf((1 + confidence) / 2)) * error
    low, value, high = (math.exp(min(ratios[group] + step, 700.0)) for step in (-reach, 0.0, reach))
    return Margin(value=value, low=low, high=high, limit=limit)


def change_of_contrast(
    own: NDArray[np.float32], fp: NDArray[np.float32], limit: float, *, confidence: float = 0.95
) -> Margin | None:
    """The factor by which the contrast of pictures changes: the mean over pictures of their standard deviation.

    The interval is Student's, of the factor's logarithm, to first order in what single pairs of pictures add to it.

    Args:
        own: pictures ``[N, C, H, W]`` of the quantized model, finite.
        fp: of the floating-point model, from the same prompts and noise.
        limit: what the factor is held against: it is to lie between ``1 / limit`` and ``limit``.
        confidence: of the interval.

    Returns:
        The factor, of deviations with one grey level added to both; None for pictures of a single value.
    """
    if own[0].size < 2:
        return None
    after, before = (batch.reshape(len(batch), -1).std(axis=1, dtype=np.float64) + _GREY for batch in (own, fp))
    middle, pairs = math.log(after.mean() / before.mean()), after / after.mean() - before / before.mean()
    reach = math.inf
    if len(own) > 1:
        reach = float(stats.t.ppf((1 + confidence) / 2, len(own) - 1) * pairs.std(ddof=1) / math.sqrt(len(own)))
    low, value, high = (math.exp(min(middle + step, 700.0)) for step in (-reach, 0.0, reach))
    return Margin(value=value, low=low, high=high, limit=limit)


def _counts(images: NDArray[np.float32]) -> NDArray[np.float64]:
    """How many differences of neighbours fall in each bin, ``[N, bins]``."""
    found = np.zeros((len(images), len(_EDGES) - 1))
    for number, image in enumerate(images):
        for axis in (-1, -2):
            sizes = np.log(np.abs(np.diff(image.astype(np.float64), axis=axis)) + _GREY)
            found[number] += np.histogram(np.clip(sizes, _EDGES[0], _EDGES[-1]), _EDGES)[0]
    return found


def _log_ratios(counts: list[NDArray[np.float64]], drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logarithm of the ratio in each group ``[draws, groups]``, of pictures drawn so many times ``[draws, N]``."""
    own, fp = (
        np.stack([np.interp(_LEVELS, row.cumsum() / row.sum(), _EDGES[1:]) for row in drawn @ batch])
        for batch in counts
    )
    return np.asarray((own - fp).reshape(len(drawn), _GROUPS, -1).mean(axis=-1))
