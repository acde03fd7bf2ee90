from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from qdexport.check.runs import Feed, compare_with_onnx
from qdexport.errors import ParityError

MODEL = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["" : 21]> '
    'g (float[3] x) => (int64[3] "L/codes", float[3] "L/y") '
    '{ "L/codes" = Cast<to: int = 7>(x) "L/y" = Add(x, x) }'
).SerializeToString()
FEED: Feed = {"x": np.float32([1, 2, 4])}


def right(feed: Feed) -> Feed:
    return {"L/codes": feed["x"].astype(np.int16), "L/y": 2 * feed["x"]}


def test_outputs_are_compared_one_by_one() -> None:
    (matches,) = compare_with_onnx(MODEL, right, [FEED])
    assert set(matches) == {"L/codes", "L/y"}
    assert all(matches.values())


def test_a_layer_is_its_codes_and_its_output() -> None:
    def wrong(feed: Feed) -> Feed:
        return {"L/codes": np.int16([1, 2, 5]), "L/y": 2 * feed["x"] * np.float32(1.01)}

    (matches,) = compare_with_onnx(MODEL, wrong, [FEED], layers=["L"])
    assert matches["L"].flip_rate == pytest.approx(1 / 3)
    # a hundredth of a signal of 1.01, in FP32
    assert matches["L"].sqnr_db == pytest.approx(20 * math.log10(101), abs=1e-3)
    assert not matches["L"]


def test_every_feed_is_compared_in_order() -> None:
    feeds = [{"x": np.float32([k, k, k])} for k in (1, 2, 3)]
    answers = iter([right(feeds[0]), right(feeds[0]), right(feeds[2])])
    matches = compare_with_onnx(MODEL, lambda _: next(answers), feeds, layers=["L"])
    assert [bool(match["L"]) for match in matches] == [True, False, True]


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    compare_with_onnx(MODEL, right, [FEED])
    with pytest.raises(ParityError):
        compare_with_onnx(MODEL, right, [{"x": np.float32([1, 2])}])
    assert capfd.readouterr() == ("", "")


def test_a_feed_of_another_shape_is_an_error() -> None:
    with pytest.raises(ParityError, match="x"):
        compare_with_onnx(MODEL, right, [{"x": np.float32([1, 2])}])


def test_an_output_that_the_file_lacks_is_an_error() -> None:
    with pytest.raises(ParityError, match="no output 'L/z'"):
        compare_with_onnx(MODEL, lambda feed: {"L/z": feed["x"]}, [FEED])
