"""Grain and contrast of pictures: noise and blur are found, other pictures of the same kind are not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qdexport.check.outcome import beyond
from qdexport.check.pictures import Pictures
from qdexport.check.texture import change_of_contrast, change_of_texture
from qdexport.core.recipe import PictureLimits

LIMIT = PictureLimits().texture


def scenes(count: int, seed: int, size: int = 16) -> np.ndarray:
    """A bright rectangle on a ground of any colour, softened; no two seeds share a ground."""
    source = np.random.default_rng(seed)
    images = np.empty((count, 3, size, size), np.float32)
    for image in images:
        image[:] = source.uniform(-1, 1, (3, 1, 1))
        top, left = source.integers(2, size // 2, 2)
        image[:, top : top + 6, left : left + 6] = source.uniform(-1, 1, (3, 1, 1))
    soft = (images + np.roll(images, 1, -1) + np.roll(images, 1, -2)) / 3
    return np.asarray(soft + 0.02 * source.standard_normal(soft.shape), np.float32)


def noisy(images: np.ndarray, spread: float) -> np.ndarray:
    return np.asarray(images + spread * np.random.default_rng(9).standard_normal(images.shape), np.float32)


def test_equal_pictures_have_the_same_texture() -> None:
    fp = scenes(8, 0)
    same = change_of_texture(fp, fp, LIMIT)
    assert same is not None
    assert (same.value, same.low, same.high, same.limit) == (1.0, 1.0, 1.0, LIMIT)


def test_another_seed_is_no_change_beyond_chance() -> None:
    found = [change_of_texture(scenes(32, 2 * seed), scenes(32, 2 * seed + 1), LIMIT) for seed in range(20)]
    assert not any(item is None or beyond(item) for item in found)


def test_noise_is_found_where_another_seed_differs_more() -> None:
    fp = scenes(32, 0)
    own, others = noisy(fp, 0.2), scenes(32, 1)
    found = Pictures.of(own, fp, others, None, PictureLimits())
    assert found.share is not None
    assert found.share.high < found.share.limit  # the share alone would keep it
    assert found.texture is not None
    assert found.texture.value > LIMIT
    assert beyond(found.texture)


def test_lost_contrast_is_found_and_is_below_one() -> None:
    fp = scenes(32, 0)
    for change in (change_of_texture, change_of_contrast):
        flat = change(fp * np.float32(0.6), fp, 1.2)
        assert flat is not None
        assert flat.value == pytest.approx(0.6, abs=0.05)
        assert beyond(flat)


def test_contrast_of_another_seed_is_no_change_beyond_chance() -> None:
    found = [change_of_contrast(scenes(32, 2 * seed), scenes(32, 2 * seed + 1), 1.2) for seed in range(20)]
    assert not any(item is None or beyond(item) for item in found)


def test_contrast_of_one_picture_and_of_one_pixel() -> None:
    fp = scenes(1, 0)
    single = change_of_contrast(0 * fp, fp, 1.2)
    assert single is not None
    assert np.isfinite([single.low, single.high]).all()
    assert not beyond(single)
    assert change_of_contrast(fp[:, :1, :1, :1], fp[:, :1, :1, :1], 1.2) is None


@pytest.mark.parametrize("spread", [0.0, 0.005, 0.01])
def test_noise_that_nobody_sees_is_none(spread: float) -> None:
    """Half a grey level or one and a quarter, on grain of two and a half."""
    fp = scenes(32, 0)
    found = change_of_texture(noisy(fp, spread), fp, LIMIT)
    assert found is not None
    assert not beyond(found)


def test_a_flat_ground_has_a_texture_of_one_grey_level() -> None:
    flat = np.zeros((4, 1, 8, 8), np.float32)
    found = change_of_texture(noisy(flat, 1e-4), flat, LIMIT)
    assert found is not None
    assert math.log(found.value) == pytest.approx(0, abs=0.03)  # a thousandth of a grey level, and bins of 0.01


def test_large_values_and_odd_shapes_have_one() -> None:
    latents = 30 * scenes(4, 0)
    assert change_of_texture(latents, latents, LIMIT) is not None
    column = scenes(4, 0)[..., :1]
    assert change_of_texture(column, column, LIMIT) is not None
    assert change_of_texture(column[..., :1, :], column[..., :1, :], LIMIT) is None


def test_one_picture_proves_nothing() -> None:
    fp = scenes(1, 0)
    found = change_of_texture(noisy(fp, 0.3), fp, LIMIT)
    assert found is not None
    assert np.isfinite([found.low, found.high]).all()
    assert not beyond(found, few=True)


def test_no_more_pictures_are_asked_for_where_one_limit_is_crossed_for_certain() -> None:
    """Texture is near its limit in both; in the second the share is ten times what is allowed."""
    fp = scenes(32, 0)
    own, others = noisy(fp, 0.04), scenes(32, 1)
    near = Pictures.of(own, fp, others, None, PictureLimits(texture=1.98))
    assert near.texture is not None
    assert near.texture.low < 1.98 < near.texture.high
    assert near.undecided()
    assert not Pictures.of(own, fp, noisy(fp, 0.02), None, PictureLimits(texture=1.98)).undecided()
