from __future__ import annotations

import numpy as np
import pytest

from qdexport.check.file_pictures import picture_problems

SHAPE = (16, 3, 8, 8)


def pictures(noise: float, of_file: float, count: int = 16) -> dict[str, np.ndarray]:
    source = np.random.default_rng(0)
    fp = source.uniform(-1, 1, (count, *SHAPE[1:])).astype(np.float32)
    quantized = fp + noise * source.standard_normal(fp.shape).astype(np.float32)
    onnx = quantized + of_file * source.standard_normal(fp.shape).astype(np.float32)
    return {"fp": fp, "quantized": quantized, "onnx": onnx}


@pytest.mark.parametrize(
    ("noise", "of_file"),
    [(0.05, 0.0), (0.05, 0.05), (0.05, 0.05 * 2**0.5), (0.0, 0.01)],
)
def test_two_roundings_of_one_network_pass(noise: float, of_file: float) -> None:
    """Equal, as far as the error, as far as two unrelated ones; and a grey level where there is no error."""
    assert picture_problems(pictures(noise, of_file)) == []


def test_a_file_that_is_another_network_fails() -> None:
    (problem,) = picture_problems(pictures(0.05, 0.05 * 10**0.5))  # 10 dB, as a wrong row of a time table made it
    assert "10.3 times as far (squared)" in problem


def test_few_pictures_are_given_more_room() -> None:
    assert picture_problems(pictures(0.05, 0.2, count=2)) == []
    assert picture_problems(pictures(0.05, 0.4, count=2))


def test_nan_is_named_where_the_model_has_none() -> None:
    images = pictures(0.05, 0.0)
    images["onnx"][3, 0, 0, 0] = np.nan
    assert picture_problems(images) == [
        "1 of 16 pictures of the ONNX file hold NaN or infinity; the fake-quant model's do not"
    ]
    images["quantized"][3] = np.nan
    assert picture_problems(images) == []


def test_nothing_to_compare() -> None:
    assert picture_problems({"fp": np.zeros(SHAPE, np.float32)}) == []
