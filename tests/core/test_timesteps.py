from __future__ import annotations

import numpy as np
import pytest

from qdexport.core.timesteps import distinct, equal_reach, nearest_row, reaches, row_at, stretches, whole_step

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
def test_steps_that_are_one_but_for_rounding():
    """As KDPM2 ancestral names them: 856.2857 and 856.2861; neighbours of a dense schedule stay apart."""
    assert distinct([999, 856.2861, 856.2857, 13.45, 1.6e-5, 0.0]) == (999, 856.2861, 13.45, 1.6e-5)
    assert distinct([999, 998.97, 998.5]) == (999, 998.97, 998.5)
    edm = (1.0955, 0.3835, 0.3836, -1.5537)  # logarithms of noise levels are told apart on their own scale
    assert distinct(edm) == edm
    assert distinct([]) == ()
    assert equal_reach([]) == equal_reach([1000])


def test_whole_numbers():
    assert [whole_step(step) for step in (666, 666.0001, 665.9999, 1.6e-5, -3.0)] == [666, 666, 666, 0, -3]
    assert whole_step(666.5) is None
    assert whole_step(0.98) is None
    assert whole_step(float("nan")) is None
    assert whole_step(float("inf")) is None


def test_the_row_that_a_network_reads():
    every = tuple(range(1000))
    assert row_at(every, 41.001, 0.0) == 41
    assert row_at(every, 41.5, 0.0) is None
    assert row_at(every, -1, 0.0) is None
    assert row_at(every, float("nan"), 0.0) is None
    assert row_at((), 5.0, 0.0) is None
    # a pipeline in half precision means the row that it rounded
    assert row_at(STEPS, float(np.float16(STEPS[1])), 2.0**-10) == 1
    assert row_at(STEPS, float(np.float16(STEPS[1])), 0.0) is None
    assert reaches((1000.0, 0.5), 2.0**-10) == [1000 * 2.0**-10, 1000 * 2.0**-16]
