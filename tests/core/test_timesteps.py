from __future__ import annotations

import numpy as np
import pytest

from qdexport.core.timesteps import nearest_row, stretches

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


@pytest.mark.parametrize("steps", [(981, 500, 1, 0), (901, 601, 301, 1), (4, 8, 0), (999,), tuple(range(9, -1, -1))])
def test_stretches_are_what_the_lookup_reads(steps: tuple[int, ...]) -> None:
    """The first of two that are equally near, as an argmin over the rows."""
    rows = [int(np.abs(np.array(steps) - timestep).argmin()) for timestep in range(1000)]
    expected = [(rows.index(row), 999 - rows[::-1].index(row)) for row in range(len(steps))]
    assert stretches(steps, 1000) == expected


def test_stretches_of_fractions_end_half_way() -> None:
    assert stretches((1000.0, 400.5, 0.25), 1000) == [(700.25, 1000.0), (200.375, 700.25), (0.0, 200.375)]
    assert stretches((12.0, -3.5), 5) == [(4.25, 12.0), (-3.5, 4.25)]
