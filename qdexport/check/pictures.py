"""How far the pictures of a quantized model are from those of the floating-point one, with intervals.

The scale is what another seed makes of the same prompt, which every model has: an error that is a small part of it
is one that nobody sees who does not hold both pictures side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import stats

from qdexport.check.texture import change_of_contrast, change_of_texture
from qdexport.core.results import Margin

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qdexport.core.recipe import PictureLimits

__all__ = ["INVISIBLE", "Pictures", "fall_of_alignment", "image_errors", "share_of_other_seed"]

_CONFIDENCE: Final = 0.95
# more pictures are asked for inside this interval: several looks at growing numbers would else err too often
_WIDE: Final = 0.99
# one grey level of 256 in [-1, 1], squared: what storing a picture in 8 bits costs
INVISIBLE: Final = (2 / 255) ** 2
# two grey levels: another seed that changes less gives the same picture
_NOTHING: Final = 4 * INVISIBLE
# no error is smaller than this where logarithms are taken: equal pictures have none
_LEAST: Final = 1e-3 * INVISIBLE
_NOT_FINITE: Final = "The floating-point model's own pictures hold values that are not finite."
_SAME: Final = "Another seed gives nearly the same pictures, so that an error has no scale; compare them by eye."


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """What the verdict on a set of pictures is made of.

    Attributes:
        share: their error as a share of what another seed makes; None where it cannot be measured.
        fall: of alignment; None without an evaluator.
        texture: the factor by which differences of neighbouring pixels change; None where it cannot be measured.
        contrast: the factor by which the pictures' deviation changes; None where it cannot be measured.
        near: whether the limit of the share, of texture or of contrast lies in a wide interval of it, and none is
            crossed for certain.
        not_judged: why no verdict can come of them, in a sentence.
    """

    share: Margin | None = None
    fall: Margin | None = None
    texture: Margin | None = None
    contrast: Margin | None = None
    near: bool = False
    not_judged: str | None = None

    @classmethod
    def of(
        cls, own: NDArray[np.float32], fp: NDArray[np.float32], others: NDArray[np.float32],
        right: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None, limits: PictureLimits,
    ) -> Pictures:  # fmt: skip
        """Measures pictures ``[N, C, H, W]``.

        Args:
            own: of the quantized model.
            fp: of the floating-point model, from the same prompts and noise.
            others: of the floating-point model, from the same prompts and other noise; as many or fewer.
            right: whether each of ``fp`` and of ``own`` shows its prompt.
            limits: of the recipe.
        """
        fall = None if right is None else fall_of_alignment(*right, limits.alignment_fall)
        if not (np.isfinite(fp).all() and np.isfinite(others).all()):
            return cls(fall=fall, not_judged=_NOT_FINITE)
        count = min(len(own), len(others))
        if count == 0 or not np.isfinite(own).all():
            return cls(fall=fall)
        errors, scale = image_errors(own[:count], fp[:count]), image_errors(others[:count], fp[:count])
        least = INVISIBLE / limits.share  # an error of one grey level is never too much
        share = share_of_other_seed(errors, np.maximum(scale, least), limits.share)
        wide = share_of_other_seed(errors, np.maximum(scale, least), limits.share, confidence=_WIDE)
        of, changes = fp[: len(own)], {change_of_texture: limits.texture, change_of_contrast: limits.contrast}
        texture, contrast = (change(own, of, limit) for change, limit in changes.items())
        loose = [change(own, of, limit, confidence=_WIDE) for change, limit in changes.items()]
        same = _middle(scale) < _NOTHING and not share.high <= limits.share and not _gross(errors, fp, limits.share)
        return cls(
            share=share,
            fall=fall,
            texture=texture,
            contrast=contrast,
            near=_near(wide, [item for item in loose if item is not None]),
            not_judged=_SAME if same else None,
        )

    def undecided(self) -> bool:
        """Whether more pictures should decide: the share is near its limit, or alignment falls by about as much."""
        if self.share is None or self.not_judged is not None:
            return False
        kept = self.share.high <= self.share.limit
        return self.near or (kept and self.fall is not None and 0 < self.fall.low <= self.fall.limit)


def image_errors(images: NDArray[np.float32], reference: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean squared error of each picture, ``[N]``, of pictures ``[N, C, H, W]``."""
    difference = images.astype(np.float64) - reference
    return np.asarray(np.square(difference).reshape(len(images), -1).mean(axis=1))


def share_of_other_seed(
    errors: NDArray[np.float64], others: NDArray[np.float64], limit: float, *, confidence: float = _CONFIDENCE
) -> Margin:
    """The squared error of pictures as a share of what another seed makes of the same prompts.

    It is the square of a ratio: the mean over pictures of the root of the error, over that of the root of the other.
    Errors of single pictures differ by orders of magnitude (a thing that moves, a background that stays), so that one
    picture or two of thirty decide a ratio of plain means, whose interval is half as wide again. The interval is
    Student's, of the logarithm of the ratio, to first order in what single pairs of pictures add to it.

    Args:
        errors: of each picture to the floating-point model's.
        others: of the floating-point model's picture from other noise to the same one.
        limit: what the share is held against.
        confidence: of the interval.
    """
    own, other = np.sqrt(np.maximum(errors, _LEAST)), np.sqrt(np.maximum(others, _LEAST))
    middle = 2 * math.log(own.mean() / other.mean())
    reach = 2 * _reach(own / own.mean() - other / other.mean(), confidence)
    return Margin(value=math.exp(middle), low=math.exp(middle - reach), high=_finite_exp(middle + reach), limit=limit)


def fall_of_alignment(
    before: NDArray[np.bool_], after: NDArray[np.bool_], limit: float, *, confidence: float = _CONFIDENCE
) -> Margin:
    """By how much the share of pictures that show their prompt falls, from the same prompts and noise.

    The interval is that of Agresti and Min for paired shares: half a picture is added to each of the four counts, so
    that no lost picture among 32 is not taken for a proof that none is ever lost.
    """
    count = len(before)
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    middle = (lost - won) / (count + 2)
    error = math.sqrt(lost + won + 1 - (lost - won) ** 2 / (count + 2)) / (count + 2)
    reach = float(stats.norm.ppf((1 + confidence) / 2)) * error
    return Margin(value=(lost - won) / count, low=middle - reach, high=middle + reach, limit=limit)


def _reach(values: NDArray[np.float64], confidence: float) -> float:
    """Half the interval of a mean; that of a single number is wider than anything."""
    if len(values) < 2:
        return math.inf
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error


def _finite_exp(value: float) -> float:
    """JSON has no infinity."""
    return math.exp(min(value, 700.0))


def _near(share: Margin, factors: list[Margin]) -> bool:
    """Whether a limit lies inside an interval, and no other limit is crossed for certain."""
    outside = [factor.low > factor.limit or factor.high < 1 / factor.limit for factor in factors]
    if share.low > share.limit or any(outside):
        return False
    astride = [factor.low < edge < factor.high for factor in factors for edge in (factor.limit, 1 / factor.limit)]
    return share.limit < share.high or any(astride)


def _middle(errors: NDArray[np.float64]) -> float:
    return float(np.sqrt(errors).mean() ** 2)


def _gross(errors: NDArray[np.float64], fp: NDArray[np.float32], limit: float) -> bool:
    """Whether pictures are as far off as pictures of other prompts would be."""
    if len(fp) < 2:
        return False
    return _middle(errors) > limit * _middle(image_errors(np.roll(fp, 1, axis=0), fp)) > INVISIBLE
