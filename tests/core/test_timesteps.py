from __future__ import annotations

import numpy as np
import pytest

from qdexport.core.timesteps import nearest_row

STEPS = (1000.0, 857.142822265625, 400.5, 8.9)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_rounded_timestep_finds_its_row(dtype: type) -> None:
    for row, step in enumerate(STEPS):
        divided = dtype(dtype(step) / dtype(1000))  # as FLUX's pipeline does
        assert nearest_row(STEPS, float(dtype(step))) == row
        assert nearest_row(STEPS, float(divided) * 1000) == row


def test_another_timestep_has_no_row() -> None:
    assert nearest_row(STEPS, 858.5) is None
    assert nearest_row(STEPS, 0.0) is None
    assert nearest_row((), 5.0) is None
    assert nearest_row((981, 1), 980, relative=0.0) is None
    assert nearest_row((981, 1), 981, relative=0.0) == 0
