"""Pictures of the report: the image grid, thumbnails as data URIs, and the heat map of activation scales."""

from __future__ import annotations

import base64
import io
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from qdexport.core.files import atomic_path
from qdexport.report.facts import label_of

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.ImageFont import FreeTypeFont

__all__ = ["HeatMap", "Thumbnail", "difference", "heat_map", "image_grid", "thumbnail", "to_uint8"]

_SMALL = 128  # up to this size pixels are kept exactly and drawn as squares
_LARGEST = 384  # larger pictures are reduced: the page holds dozens of them
DIFFERENCE_GAIN = 8

_INK, _FAINT, _PAPER = (28, 32, 40), (96, 104, 116), (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A picture inside the page; ``pixelated`` when its pixels should stay squares."""

    uri: str
    width: int
    height: int
    pixelated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Scales of layers (rows) against timesteps (columns), one pixel per value, as PNG data URIs.

    Attributes:
        absolute: colour is the logarithm of the scale.
        relative: colour is the logarithm of the scale over the layer's own geometric mean.
        low: smallest scale.
        high: largest scale.
        factor: the largest ratio to a layer's mean that ``relative`` shows.
        layers: names of the rows.
        spans: largest over smallest scale of each row.
        timesteps: labels of the columns.
        sequential: CSS colours of the legend of ``absolute``.
        diverging: CSS colours of the legend of ``relative``.
    """

    absolute: str
    relative: str
    low: float
    high: float
    factor: float
    layers: tuple[str, ...]
    spans: tuple[float, ...]
    timesteps: tuple[float, ...]
    sequential: str
    diverging: str


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Turns an image ``[C, H, W]`` in [-1, 1] into bytes ``[H, W, 3]``.

    One channel is grey; of more than three (the latents of a model without a VAE) the first three are the colours, and
    two have no blue. What is not finite is black.

    Raises:
        ValueError: the array has another shape.
    """
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"an image must have the shape [channels, height, width], not {list(image.shape)}")
    colours = np.full((3, *image.shape[1:]), -1.0, np.float32)
    colours[: len(image)] = image[:3]
    if len(image) == 1:
        colours[:] = image
    scaled = np.clip(np.nan_to_num(colours, nan=-1.0) * 0.5 + 0.5, 0.0, 1.0) * 255.0
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8).transpose(1, 2, 0))


def image_grid(
    columns: dict[str, list[np.ndarray]],
    prompts: list[str],
    path: Path,
    max_rows: int = 8,
    scale: int | None = None,
) -> None:
    """Writes a labelled PNG: one row per prompt, one picture per column.

    Args:
        columns: images ``[C, H, W]`` in [-1, 1] per column; all columns show the same prompts.
        prompts: one caption per row; the shortest of columns and captions says how many rows.
        path: the PNG file.
        max_rows: rows that are drawn at most.
        scale: how many pixels wide one pixel becomes (nearest neighbour); default: 128-pixel pictures.

    Raises:
        ValueError: there is nothing to draw, or an image has a wrong shape.
        OutputError: the file cannot be written.
    """
    rows = min([max_rows, len(prompts), *map(len, columns.values())])
    if not columns or rows < 1:
        raise ValueError("an image grid needs at least one column, one prompt and one image in each column")
    first = next(iter(columns.values()))[0]
    zoom = scale or max(1, 128 // int(max(first.shape[1:])))
    width, height = int(first.shape[2]) * zoom, int(first.shape[1]) * zoom
    caption, gap, head = 190, 10, 34
    sheet = Image.new(
        "RGB",
        (caption + len(columns) * (width + gap) + gap, head + rows * (height + gap)),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    bold, plain = _font(15, bold=True), _font(13)
    for row in range(rows):
        top = head + row * (height + gap)
        _caption(draw, prompts[row], (12, top), (caption - 20, height), plain)
        for column, images in enumerate(columns.values()):
            picture = Image.fromarray(to_uint8(images[row])).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (caption + column * (width + gap), top))
    for column, name in enumerate(columns):
        place = caption + column * (width + gap) + width / 2
        label = label_of(name)
        font = _font(max(8, min(15, int(15 * width / draw.textlength(label, font=bold)))), bold=True)
        draw.text((place, head / 2), label, fill=_INK, font=font, anchor="mm")
    with atomic_path(path) as partial:
        sheet.save(partial, format="PNG", optimize=True)


def thumbnail(image: Path | Image.Image, largest: int = _LARGEST) -> Thumbnail:
    """Prepares a picture for the page: small ones as exact PNG, others as JPEG within ``largest`` pixels."""
    picture = image if isinstance(image, Image.Image) else Image.open(image)
    picture = picture.convert("RGB")
    small = max(picture.size) <= _SMALL
    if not small:
        picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if small:
        picture.save(stream, format="PNG", optimize=True)
    else:
        picture.save(stream, format="JPEG", quality=88)
    return Thumbnail(_uri(stream.getvalue(), "png" if small else "jpeg"), *picture.size, pixelated=small)


def difference(first: Path, second: Path) -> Thumbnail:
    """The absolute difference of two pictures, amplified by ``DIFFERENCE_GAIN``; black where they agree."""
    with Image.open(first) as one, Image.open(second) as other:
        apart = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
    return thumbnail(apart.point([min(255, value * DIFFERENCE_GAIN) for value in range(256)] * 3))


def heat_map(scales: dict[str, list[float]], timesteps: list[float]) -> HeatMap:
    """Draws scales against timesteps; a layer with one scale is the same at every step.

    Args:
        scales: positive scales per layer, one for each timestep or a single one.
        timesteps: the timesteps, in the order of sampling.

    Raises:
        ValueError: a layer has neither one scale nor one for each timestep, or a scale is not positive.
    """
    from matplotlib import colormaps

    table = np.empty((len(scales), len(timesteps)))
    for row, (name, values) in enumerate(scales.items()):
        if len(values) not in {1, len(timesteps)}:
            raise ValueError(f"layer {name} has {len(values)} scales for {len(timesteps)} timesteps")
        table[row] = values
    if not (np.isfinite(table).all() and (table > 0).all()):
        raise ValueError("activation scales must be positive and finite")
    logs = np.log2(table)
    low, high = float(logs.min()), float(logs.max())
    absolute = (logs - low) / max(high - low, 1e-9)
    centred = logs - logs.mean(axis=1, keepdims=True)
    reach = max(float(np.abs(centred).max()), 0.25)
    sequential, diverging = colormaps["viridis"], colormaps["coolwarm"]
    stops = np.linspace(0, 1, 9)
    return HeatMap(
        absolute=_raster(sequential(absolute)),
        relative=_raster(diverging(centred / (2 * reach) + 0.5)),
        low=2.0**low,
        high=2.0**high,
        factor=2.0**reach,
        layers=tuple(scales),
        spans=tuple(float(span) for span in table.max(axis=1) / table.min(axis=1)),
        timesteps=tuple(timesteps),
        sequential=_gradient(sequential(stops)),
        diverging=_gradient(diverging(stops)),
    )


def _raster(colours: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.rint(colours[..., :3] * 255).astype(np.uint8)).save(
        stream, format="PNG", optimize=True
    )
    return _uri(stream.getvalue(), "png")


def _gradient(colours: np.ndarray) -> str:
    return ", ".join("#" + "".join(f"{round(part * 255):02x}" for part in colour[:3]) for colour in colours)


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _font(points: int, *, bold: bool = False) -> FreeTypeFont:
    import matplotlib as mpl

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{mpl.get_data_path()}/fonts/ttf/{name}", points)


def _caption(
    draw: ImageDraw.ImageDraw, text: str, corner: tuple[int, int], box: tuple[int, int], font: FreeTypeFont
) -> None:
    per_line = max(8, int(box[0] / draw.textlength("n", font=font)))
    most = max(1, box[1] // 18)
    lines = textwrap.wrap(text, per_line, max_lines=most, placeholder=" …") or [""]
    middle = corner[1] + box[1] / 2
    draw.multiline_text((corner[0], middle), "\n".join(lines), fill=_FAINT, font=font, anchor="lm", spacing=4)
