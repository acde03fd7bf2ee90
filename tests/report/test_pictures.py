from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from qdexport.report import pictures

if TYPE_CHECKING:
    from pathlib import Path


def pixels_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def height_of(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.height


def test_to_uint8_covers_the_range() -> None:
    image = np.array([-1.5, -1.0, 0.0, 1.0], np.float32).reshape(1, 2, 2).repeat(3, 0)
    assert pictures.to_uint8(image)[..., 0].tolist() == [[0, 0], [128, 255]]
    for wrong in ((8, 8), (0, 8, 8), (3, 0, 8)):
        with pytest.raises(ValueError, match=r"\[channels, height, width\], not "):
            pictures.to_uint8(np.zeros(wrong))


def test_other_channels_than_three_are_shown() -> None:
    grey = np.array([[[-1.0, 1.0]]], np.float32)
    assert pictures.to_uint8(grey).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    four = np.concatenate([grey, -grey, grey, grey * 100])
    assert pictures.to_uint8(four).tolist() == [[[0, 255, 0], [255, 0, 255]]]
    assert pictures.to_uint8(four[:2]).tolist() == [[[0, 255, 0], [255, 0, 0]]]
    assert pictures.to_uint8(grey * np.nan).tolist() == [[[0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 512, 4), (2, 4, 512), (3, 7, 5)])
def test_image_grid_of_any_size(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    pictures.image_grid({"fp": [np.zeros(shape, np.float32)]}, [""], tmp_path / "grid.png")
    assert 34 < height_of(tmp_path / "grid.png") <= 34 + 512 + 10


def test_image_grid_draws_nearest_pixels(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    columns = {
        name: [noise.uniform(-1, 1, (3, 32, 32)).astype(np.float32) for _ in range(3)]
        for name in ("fp", "quantized", "onnx")
    }
    pictures.image_grid(columns, ["a red circle", "<b>bold</b> " * 40, "ü"], tmp_path / "grid.png", scale=4)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (34 + 3 * 138, 190 + 3 * 138 + 10, 3)
    for row in range(3):
        for column, images in enumerate(columns.values()):
            top, left = 34 + row * 138, 190 + column * 138
            found = sheet[top : top + 128 : 4, left : left + 128 : 4]
            assert (found == pictures.to_uint8(images[row])).all()
            assert (sheet[top + 3 : top + 128 : 4, left + 3 : left + 128 : 4] == found).all()


def test_image_grid_draws_as_many_rows_as_there_are(tmp_path: Path) -> None:
    images = [np.zeros((3, 64, 64), np.float32)] * 10
    pictures.image_grid({"fp": images, "onnx": images[:5]}, ["p"] * 10, tmp_path / "a.png")
    assert height_of(tmp_path / "a.png") == 34 + 5 * 138
    pictures.image_grid({"fp": images}, ["p"] * 10, tmp_path / "b.png", max_rows=2)
    assert height_of(tmp_path / "b.png") == 34 + 2 * 138
    with pytest.raises(ValueError, match="at least one column"):
        pictures.image_grid({}, ["p"], tmp_path / "c.png")
    with pytest.raises(ValueError, match="at least one column"):
        pictures.image_grid({"fp": []}, ["p"], tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_small_pictures_are_kept_exactly(images: dict[str, list[Path]]) -> None:
    path = images["fp"][0]
    made = pictures.thumbnail(path)
    assert made.pixelated
    assert (made.width, made.height) == (32, 32)
    assert (pixels_of(made.uri) == np.asarray(Image.open(path))).all()


def test_difference_is_amplified(tmp_path: Path) -> None:
    one, other = np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), 100, np.uint8)
    other[0, 0] = (97, 101, 250)
    Image.fromarray(one).save(tmp_path / "a.png")
    Image.fromarray(other).save(tmp_path / "b.png")
    apart = pixels_of(pictures.difference(tmp_path / "a.png", tmp_path / "b.png").uri)
    assert apart[0, 0].tolist() == [24, 8, 255]
    assert apart[1:].max() == 0


def test_heat_map_colours_follow_the_values() -> None:
    made = pictures.heat_map({"a": [1.0, 2.0, 4.0], "b": [0.5]}, [900, 500, 100])
    absolute, relative = pixels_of(made.absolute), pixels_of(made.relative)
    assert absolute.shape == relative.shape == (2, 3, 3)
    assert (made.low, made.high, made.factor) == (0.5, 4.0, 2.0)
    assert made.spans == (4.0, 1.0)
    # viridis begins dark violet and ends yellow; coolwarm is neutral grey in the middle
    assert absolute[1, 0].tolist() == [68, 1, 84]
    assert absolute[0, 2].tolist() == [253, 231, 37]
    middle = relative[0, 1].astype(int)
    assert middle.max() - middle.min() < 4
    assert (relative[1] == relative[0, 1]).all()
    assert relative[0, 0, 2] > relative[0, 0, 0]
    assert relative[0, 2, 0] > relative[0, 2, 2]


@pytest.mark.parametrize(("scales", "message"), [
    ({"a": [1.0, 2.0]}, "layer a has 2 scales for 3 timesteps"),
    ({"a": [1.0, 0.0, 1.0]}, "positive and finite"),
    ({"a": [float("inf")]}, "positive and finite"),
])  # fmt: skip
def test_heat_map_refuses_wrong_scales(scales: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pictures.heat_map(scales, [3, 2, 1])
