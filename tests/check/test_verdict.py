from __future__ import annotations

import math

import pytest

from qdexport.check.verdict import engine_problems, judge
from qdexport.core.results import EndToEnd, LayerParity, Parity

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


def test_half_precision_has_its_own_limit() -> None:
    assert judged(layer("a", 60.0), body="fp16").verdict == "pass"
    assert judged(layer("a", 59.9), body="fp16").verdict == "fail"


def test_the_worst_three_are_named_first() -> None:
    layers = [layer(name, value) for name, value in zip("abcde", (90.0, 20.0, 50.0, 10.0, 99.0), strict=True)]
    assert judged(*layers).reasons == [
        "the output is below 100 dB in 5 layers: d (10), b (20), c (50) and 2 more"
    ]


def test_more_than_one_decibel_below_the_floor_fails() -> None:
    parity = judged(layer("a"), whole=EndToEnd(sqnr_db=39.8, noise_floor_db=40.9))
    assert parity.reasons == ["end to end 39.8 dB, more than 1 dB below the noise floor of 40.9 dB"]
    nothing = judged(layer("a"), whole=EndToEnd(sqnr_db=math.nan, noise_floor_db=40.0))
    assert nothing.verdict == "fail"


def test_nothing_compared_is_no_pass() -> None:
    assert judged().verdict == "fail"


def test_an_engine_may_be_as_far_from_the_file_as_two_roundings_are() -> None:
    assert engine_problems([36.5, 90.0, 36.1], noise_floor_db=40.0) == []
    (problem,) = engine_problems([20.0, 36.0, 30.0], noise_floor_db=40.0)
    assert "30.0 dB only" in problem
    assert engine_problems([math.nan], noise_floor_db=40.0)
