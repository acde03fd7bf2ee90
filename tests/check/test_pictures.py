"""Errors of pictures on the scale of another seed, with intervals that hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from qdexport.check.pictures import INVISIBLE, Pictures, fall_of_alignment, image_errors, share_of_other_seed
from qdexport.core.recipe import PictureLimits

LIMITS = PictureLimits()


def pictures(count: int, spread: float, seed: int, around: np.ndarray | None = None) -> np.ndarray:
    noise = spread * np.random.default_rng(seed).standard_normal((count, 3, 8, 8))
    return np.asarray(noise if around is None else around + noise, np.float32)


def test_errors_are_by_picture() -> None:
    fp = np.zeros((2, 1, 2, 2), np.float32)
    other = fp.copy()
    other[1] = 0.5
    assert image_errors(other, fp).tolist() == [0.0, 0.25]


def test_the_share_is_a_ratio_of_mean_roots() -> None:
    share = share_of_other_seed(np.array([0.01, 0.04]), np.array([0.04, 0.16]), 0.5)
    assert share.value == pytest.approx(0.25)
    assert share.low == pytest.approx(0.25)  # both pictures say the same
    assert share.high == pytest.approx(0.25)
    assert share.limit == 0.5


def test_one_pair_has_no_interval() -> None:
    share = share_of_other_seed(np.array([0.01]), np.array([0.04]), 0.5)
    assert share.low == 0
    assert share.high > 1e100
    assert np.isfinite(share.high)


def test_equal_pictures_have_a_finite_share() -> None:
    share = share_of_other_seed(np.zeros(4), np.full(4, 0.01), 0.5)
    assert 0 < share.high < 1e-4


def test_intervals_hold_the_share_about_as_often_as_they_say() -> None:
    """Errors as heavy-tailed as those of `shapes`: log-normal, deviation 1.1, correlated."""
    source, held = np.random.default_rng(0), 0
    for _ in range(400):
        common, own, other = (source.standard_normal(32) for _ in range(3))
        errors, others = np.exp(0.6 * common + 0.8 * own), np.exp(0.6 * common + 0.9 * other)
        share = share_of_other_seed(errors, others, 0.5)
        # the mean of exp(x / 2) of a normal x is exp(variance / 8), and the share is the square of a ratio of these
        held += share.low <= np.exp((1.0 - 1.17) / 4) <= share.high
    assert 0.90 < held / 400 < 0.99


@pytest.mark.parametrize(("lost", "low_above_zero"), [(0, False), (1, False), (4, False), (5, True), (9, True)])
def test_chance_explains_the_loss_of_a_few_pictures(lost: int, low_above_zero: bool) -> None:
    before = np.ones(32, bool)
    after = before.copy()
    after[:lost] = False
    fall = fall_of_alignment(before, after, 0.03)
    assert fall.value == lost / 32
    assert fall.low < fall.high
    assert (fall.low > 0) == low_above_zero


def test_pictures_won_count_against_pictures_lost() -> None:
    before, after = np.array([True, True, False, False]), np.array([False, True, True, True])
    assert fall_of_alignment(before, after, 0.03).value == -0.25


def judged(own: np.ndarray, fp: np.ndarray, others: np.ndarray) -> Pictures:
    return Pictures.of(own, fp, others, None, LIMITS)


def test_a_small_error_is_clear_and_one_near_the_limit_is_not() -> None:
    fp = pictures(32, 0.3, 0)
    others = pictures(16, 0.3, 1)
    far, beyond = (judged(pictures(32, spread, 2, fp), fp, others) for spread in (0.03, 1.0))
    # as much noise and contrast as before, half of another seed's error
    near = judged(np.float32(0.5) * fp + np.float32(0.75**0.5) * pictures(32, 0.3, 2), fp, others)
    assert far.share is not None
    assert far.share.value == pytest.approx(0.03**2 / (2 * 0.3**2), rel=0.1)
    assert [item.undecided() for item in (far, near, beyond)] == [False, True, False]


def test_where_another_seed_changes_nothing_the_error_has_no_scale() -> None:
    fp = pictures(32, 0.3, 0)
    others = pictures(32, 1e-3, 1, fp)
    assert judged(pictures(32, 0.02, 2, fp), fp, others).not_judged is not None
    # but what nobody can see is kept, and other pictures altogether are not
    invisible = judged(pictures(32, 0.5 * INVISIBLE**0.5, 2, fp), fp, others)
    assert invisible.not_judged is None
    assert invisible.share is not None
    assert invisible.share.high <= LIMITS.share
    gross = judged(pictures(32, 0.5, 2), fp, others)
    assert gross.not_judged is None
    assert gross.share is not None
    assert gross.share.low > LIMITS.share


def test_what_is_not_finite_is_told_apart() -> None:
    fp = pictures(4, 0.3, 0)
    broken = fp.copy()
    broken[0, 0, 0, 0] = np.nan
    others = pictures(4, 0.3, 1)
    assert judged(broken, fp, others) == Pictures()
    assert judged(fp, broken, others).not_judged is not None
    assert judged(fp, fp, fp[:0]) == Pictures()


def test_a_strict_limit_does_not_make_seeds_alike() -> None:
    fp = pictures(32, 0.3, 0)
    own, others = pictures(32, 0.03, 2, fp), pictures(32, 0.3, 1)
    strict = Pictures.of(own, fp, others, None, PictureLimits(share=1e-6))
    assert strict.not_judged is None
    assert strict.share is not None
    assert strict.share.low > 1e-6
