from __future__ import annotations

import math

import numpy as np
import pytest

from qdexport.check import measure
from qdexport.check.measure import WORST_DB, flip_rate, sqnr_db


def test_one_percent_is_forty_decibels() -> None:
    signal = np.array([3.0, -4.0, 12.0], np.float32)
    # 1.01 in FP32 is off by 1e-8: far below what four digits show
    assert sqnr_db(signal, signal * np.float32(1.01)) == pytest.approx(40.0, abs=1e-3)


def test_equal_tensors_have_no_noise() -> None:
    assert sqnr_db(np.ones(3, np.float16), np.ones(3, np.float16)) == math.inf
    assert sqnr_db(np.zeros(3), np.zeros(3)) == math.inf


@pytest.mark.parametrize(
    ("reference", "other"),
    [
        (np.ones(2), np.array([1.0, np.nan])),
        (np.ones(2), np.array([1.0, np.inf])),
        (np.array([1.0, np.nan]), np.ones(2)),
        (np.zeros(2), np.ones(2)),
        (np.ones(2), np.ones(3)),
    ],
    ids=["nan", "infinite", "nan reference", "no signal", "other shape"],
)
def test_what_cannot_be_compared_is_worst(reference: np.ndarray, other: np.ndarray) -> None:
    assert sqnr_db(reference, other) == WORST_DB


def test_slices_are_summed(monkeypatch: pytest.MonkeyPatch, noise: np.random.Generator) -> None:
    a, b = noise.standard_normal((2, 5, 7)).astype(np.float32)
    whole = sqnr_db(a, b)
    monkeypatch.setattr(measure, "_SLICE", 4)
    # float64 sums in another order
    assert sqnr_db(a, b) == pytest.approx(whole, rel=1e-12)


def test_half_precision_is_measured_in_double() -> None:
    # the squares overflow FP16
    assert sqnr_db(np.float16([300.0]), np.float16([303.0])) == pytest.approx(40.0, abs=1e-9)


def test_flips_are_counted_across_integer_types() -> None:
    assert flip_rate(np.int16([1, 2, 3, -4]), np.int8([1, 2, 4, -4])) == 0.25
    assert flip_rate(np.int16([1, 2]), np.int8([1])) == 1.0
    assert flip_rate(np.int16([]), np.int8([])) == 0.0
