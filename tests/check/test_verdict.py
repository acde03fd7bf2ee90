from __future__ import annotations

import math

import pytest

from qdexport.check.verdict import engine_problems, judge
from qdexport.core.results import EndToEnd, Float64Parity, LayerParity, Parity

GOOD_WHOLE = EndToEnd(sqnr_db=40.0, noise_floor_db=40.9)


def layer(name: str, sqnr_db: float = 130.0, flips: float = 0.0, weights: float = 0.0) -> LayerParity:
    return LayerParity(name=name, sqnr_db=sqnr_db, code_flip_rate=flips, weight_flip_rate=weights, steps=3)


def judged(*layers: LayerParity, body: str = "fp32", whole: EndToEnd = GOOD_WHOLE) -> Parity:
    return judge(layers, whole, body, "reference")


def test_everything_within_its_limit_passes() -> None:
    parity = judged(layer("a", 100.0, 1e-4), layer("b", math.inf))
    assert (parity.verdict, parity.reasons, parity.reference) == ("pass", [], "reference")
    assert [item.name for item in parity.layers] == ["a", "b"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (layer("x", 99.9), "the output is below 100 dB in 1 layer: x (99.9)"),
        (layer("x", math.nan), "the output is below 100 dB in 1 layer: x (nan)"),
        (layer("x", flips=2e-4), "more than 0.0001 of the activation codes differ in 1 layer: x (0.0002)"),
        (layer("x", weights=1e-6), "integer weights differ in 1 layer: x (1e-06)"),
    ],
)
def test_one_bad_layer_fails_and_is_named(bad: LayerParity, reason: str) -> None:
    parity = judged(layer("a"), bad)
    assert parity.verdict == "fail"
    assert parity.reasons == [reason]


def test_an_overflow_is_named_with_its_size_and_the_remedy() -> None:
    bad = layer("conv1", -999.0).model_copy(update={"beyond_fp16": 1.2e6})
    first, *_ = judged(layer("a"), bad, body="fp16").reasons
    assert first == (
        "numbers beyond 65504, the largest of FP16, overflow the FP16 body in 1 layer: conv1 (1.2e+06); compile with "
        "--body fp32"
    )


def test_half_precision_has_its_own_limit() -> None:
    assert judged(layer("a", 60.0), body="fp16").verdict == "pass"
    assert judged(layer("a", 59.9), body="fp16").verdict == "fail"


def test_the_worst_three_are_named_first() -> None:
    layers = [layer(name, value) for name, value in zip("abcde", (90.0, 20.0, 50.0, 10.0, 99.0), strict=True)]
    assert judged(*layers).reasons == [
        "the output is below 100 dB in 5 layers: d (10), b (20), c (50) and 2 more"
    ]


def test_the_noise_floor_decides_nothing() -> None:
    """A code that flips by chance costs one call tens of decibels, and its noise floor none."""
    assert judged(layer("a"), whole=EndToEnd(sqnr_db=20.0, noise_floor_db=120.0)).verdict == "pass"


def test_what_differs_in_float64_fails_and_the_first_places_are_named() -> None:
    problems = [f"place {index} differs" for index in range(8)]
    found = Float64Parity(calls=1, tensors=9, sqnr_db=40.0, problems=problems)
    parity = judge([layer("a")], GOOD_WHOLE, "fp32", "reference", float64=found)
    assert parity.reasons == [*problems[:6], "and 2 more differences in float64"]
    assert parity.verdict == "fail"
    assert parity.float64 == found
    right = Float64Parity(calls=1, tensors=9, sqnr_db=150.0)
    assert judge([layer("a")], GOOD_WHOLE, "fp32", "reference", float64=right).verdict == "pass"


def test_nothing_compared_is_no_pass() -> None:
    assert judged().verdict == "fail"


def test_an_engine_may_be_as_far_from_the_file_as_two_roundings_are() -> None:
    assert engine_problems([36.5, 90.0, 36.1], noise_floor_db=40.0) == []
    (problem,) = engine_problems([20.0, 36.0, 30.0], noise_floor_db=40.0)
    assert "30.0 dB only" in problem
    assert engine_problems([math.nan], noise_floor_db=40.0)
