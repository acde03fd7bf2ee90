from __future__ import annotations

import numpy as np
import pytest

from qdexport.models.similarity import structural_similarity


@pytest.mark.parametrize("shape", [(1, 1, 6, 6), (2, 4, 6, 30), (1, 3, 32, 16)])
def test_pictures_of_any_channels(shape: tuple[int, ...]) -> None:
    noise = np.random.default_rng(0)
    first = noise.uniform(-1, 1, shape).astype(np.float32)
    second = np.clip(first + noise.normal(0, 0.1, shape), -1, 1).astype(np.float32)
    assert structural_similarity(first, first) == pytest.approx(1, abs=1e-6)
    value = structural_similarity(first, second)
    assert value is not None
    assert 0.5 < value < 0.999


@pytest.mark.parametrize("shape", [(1, 3, 5, 64), (1, 1, 64, 4), (1, 1, 1, 1)])
def test_pictures_smaller_than_half_a_window_have_none(shape: tuple[int, ...]) -> None:
    first = np.zeros(shape, np.float32)
    assert structural_similarity(first, first) is None
