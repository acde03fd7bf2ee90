"""The bundled shapes models: where they lie, the captions they know, and real pictures of a caption.

`shapes` is a small Stable Diffusion and `shapes-turbo` its four-step distillation, both trained for this
project (tools/train_shapes.py). A caption names one or two coloured shapes on a plain background; a picture
of it can be drawn, so a training set and the truth for every quality number come from this file alone.

Nothing here imports torch: the network that reads pictures is in `qdexport.models.shapes_evaluator`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from qdexport.errors import ModelError

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "IMAGE_SIZE",
    "LAYOUTS",
    "RELATIONS",
    "SHAPES",
    "Attributes",
    "Thing",
    "all_captions",
    "bundled_model_path",
    "bundled_models",
    "captions",
    "parse_caption",
    "real_images",
    "render",
]

Rgb = tuple[int, int, int]

# The order of the entries is the order of the evaluator's classes.
COLOURS: Final[dict[str, Rgb]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
}
SHAPES: Final = ("circle", "square", "triangle", "cross")
BACKGROUNDS: Final[dict[str, Rgb]] = {
    "black": (15, 15, 20),
    "white": (245, 245, 240),
    "gray": (128, 128, 130),
    "brown": (100, 70, 45),
}
LAYOUTS: Final = ("one object", "side by side", "one above the other")

# relation -> (layout, whether the thing named first is the left or upper one)
RELATIONS: Final[dict[str, tuple[str, bool]]] = {
    "left of": ("side by side", True),
    "right of": ("side by side", False),
    "above": ("one above the other", True),
    "below": ("one above the other", False),
}

IMAGE_SIZE: Final = 32
_CANVAS_SIZE: Final = 256
_SINGLE_SHARE: Final = 0.35
_CENTRE_JITTER: Final = 0.03
_SINGLE_RADIUS: Final = (0.24, 0.34)
_PAIR_RADIUS: Final = (0.19, 0.23)
_PAIR_CENTRES: Final = (0.27, 0.73)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One coloured shape.

    Attributes:
        colour: A key of `COLOURS`.
        shape: An entry of `SHAPES`.
    """

    colour: str
    shape: str

    def __post_init__(self) -> None:
        if self.colour not in COLOURS:
            raise ModelError(f"unknown colour {self.colour!r}; use one of {', '.join(COLOURS)}")
        if self.shape not in SHAPES:
            raise ModelError(f"unknown shape {self.shape!r}; use one of {', '.join(SHAPES)}")

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """What a picture shows, independent of the words chosen for it ("a left of b" is "b right of a").

    Attributes:
        layout: An entry of `LAYOUTS`.
        background: A key of `BACKGROUNDS`.
        first: The only thing, or the left or upper one of two.
        second: The right or lower thing; None exactly when the layout is "one object".
    """

    layout: str
    background: str
    first: Thing
    second: Thing | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ModelError(f"unknown layout {self.layout!r}; use one of {', '.join(LAYOUTS)}")
        if self.background not in BACKGROUNDS:
            raise ModelError(f"unknown background {self.background!r}; use one of {', '.join(BACKGROUNDS)}")
        if (self.second is None) != (self.layout == "one object"):
            raise ModelError(
                f"layout {self.layout!r} does not fit second={self.second}: a pair has two things"
            )

    def labels(self) -> tuple[int, ...]:
        """Class numbers in the order of the evaluator's heads; -1 where a head does not count."""
        second = (-1, -1) if self.second is None else _thing_labels(self.second)
        return (
            LAYOUTS.index(self.layout),
            list(BACKGROUNDS).index(self.background),
            *_thing_labels(self.first),
            *second,
        )


def _thing_labels(thing: Thing) -> tuple[int, int]:
    return list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)


def bundled_models() -> dict[str, Path]:
    """Names of the models inside the package and their diffusers folders.

    Raises:
        ModelError: The package was installed without its data, or as a zip file.
    """
    return {name: bundled_model_path(name) for name in ("shapes", "shapes-turbo")}


def bundled_model_path(name: str) -> Path:
    """The diffusers folder of one bundled model.

    Args:
        name: `shapes` or `shapes-turbo`.

    Raises:
        ModelError: There is no bundled model of this name, or its files are not on disk.
    """
    if name not in ("shapes", "shapes-turbo"):
        raise ModelError(f"no bundled model is called {name!r}; use shapes or shapes-turbo")
    with as_file(files("qdexport") / "assets" / name) as folder:
        # as_file unpacks a zipped package into a temporary folder that is gone after this block
        path = folder
    if not (path / "model_index.json").is_file():
        raise ModelError(
            f"the bundled model {name!r} is not at {path}; install qdexport as files, not as a zip"
        )
    return path


def all_captions() -> Iterator[str]:
    """Every sentence of the grammar, 80 about one thing and 5,120 about two, in a fixed order."""
    things = [Thing(colour=colour, shape=shape) for colour in COLOURS for shape in SHAPES]
    for background in BACKGROUNDS:
        for thing in things:
            yield f"a {thing} on a {background} background"
        for relation in RELATIONS:
            for named_first in things:
                for named_second in things:
                    if named_first.colour != named_second.colour:
                        yield f"a {named_first} {relation} a {named_second} on a {background} background"


def captions(count: int, seed: int) -> list[str]:
    """Random sentences of the grammar, drawn with replacement in the shares of the training set.

    35 % are about one thing; all words are drawn uniformly, the second colour among those that differ from
    the first. The draws come from `random.Random(seed)`, so equal arguments give equal captions everywhere
    and a longer list starts with the shorter one.

    Args:
        count: Number of captions.
        seed: Any integer.
    """
    source = random.Random(seed)
    return [_draw_caption(source) for _ in range(count)]


def _draw_caption(source: random.Random) -> str:
    background = source.choice(list(BACKGROUNDS))
    colour = source.choice(list(COLOURS))
    first = Thing(colour=colour, shape=source.choice(SHAPES))
    if source.random() < _SINGLE_SHARE:
        return f"a {first} on a {background} background"
    relation = source.choice(list(RELATIONS))
    second = Thing(colour=source.choice([c for c in COLOURS if c != colour]), shape=source.choice(SHAPES))
    return f"a {first} {relation} a {second} on a {background} background"


def parse_caption(caption: str) -> Attributes:
    """Reads what a caption of the grammar asks for.

    Args:
        caption: `a COLOUR SHAPE [RELATION a COLOUR SHAPE] on a BACKGROUND background`.

    Raises:
        ModelError: The sentence is not of the grammar: its alignment could not be judged.
    """
    try:
        return _read_words(caption.split())
    except ModelError as error:
        raise ModelError(
            f"the caption {caption!r} is not one the shapes evaluator can judge: {error}. "
            "Write 'a COLOUR SHAPE on a BACKGROUND background' or "
            "'a COLOUR SHAPE RELATION a COLOUR SHAPE on a BACKGROUND background'"
        ) from None


def _read_words(words: list[str]) -> Attributes:
    match words:
        case ["a", colour, shape, "on", "a", background, "background"]:
            first = Thing(colour=colour, shape=shape)
            return Attributes(layout="one object", background=background, first=first)
        case ["a", colour, shape, *relation, "a", colour2, shape2, "on", "a", background, "background"]:
            layout, in_order = _relation(" ".join(relation))
            if colour == colour2:
                raise ModelError(f"both things are {colour}, but the colours of a pair differ")
            things = [Thing(colour=colour, shape=shape), Thing(colour=colour2, shape=shape2)]
            first, second = things if in_order else reversed(things)
            return Attributes(layout=layout, background=background, first=first, second=second)
    raise ModelError("its words do not fit the pattern")


def _relation(words: str) -> tuple[str, bool]:
    if words not in RELATIONS:
        raise ModelError(f"unknown relation {words!r}; use one of {', '.join(RELATIONS)}")
    return RELATIONS[words]


def render(attributes: Attributes, seed: int) -> NDArray[np.uint8]:
    """Draws a real picture of the attributes, the way the training set was drawn.

    One thing: centre 0.5, radius 0.24 to 0.34 of the side. Two: centres 0.27 and 0.73 along the axis of the
    layout, radius 0.19 to 0.23. Centres move by up to 0.03 both ways. Drawn at 256 x 256, reduced with
    Lanczos.

    Args:
        attributes: What to draw.
        seed: Chooses radii and centres.

    Returns:
        uint8, [32, 32, 3], RGB.
    """
    source = np.random.default_rng(seed)
    canvas = Image.new("RGB", (_CANVAS_SIZE, _CANVAS_SIZE), BACKGROUNDS[attributes.background])
    brush = ImageDraw.Draw(canvas)
    if attributes.second is None:
        _draw_thing(brush, attributes.first, (0.5, 0.5), _SINGLE_RADIUS, source)
    else:
        for thing, along in zip((attributes.first, attributes.second), _PAIR_CENTRES, strict=True):
            centre = (along, 0.5) if attributes.layout == "side by side" else (0.5, along)
            _draw_thing(brush, thing, centre, _PAIR_RADIUS, source)
    small = canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.uint8)


def _draw_thing(
    brush: ImageDraw.ImageDraw,
    thing: Thing,
    centre: tuple[float, float],
    radius_range: tuple[float, float],
    source: np.random.Generator,
) -> None:
    x, y = (_CANVAS_SIZE * (c + source.uniform(-_CENTRE_JITTER, _CENTRE_JITTER)) for c in centre)
    r = _CANVAS_SIZE * source.uniform(*radius_range)
    fill = COLOURS[thing.colour]
    match thing.shape:
        case "circle":
            brush.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        case "square":
            half = 0.85 * r
            brush.rectangle((x - half, y - half, x + half, y + half), fill=fill)
        case "triangle":
            base, half = y + 0.8 * r, 0.95 * r
            brush.polygon([(x, y - r), (x - half, base), (x + half, base)], fill=fill)
        case "cross":
            half = 0.36 * r
            brush.rectangle((x - r, y - half, x + r, y + half), fill=fill)
            brush.rectangle((x - half, y - r, x + half, y + r), fill=fill)
        case _:
            raise ModelError(f"no way to draw a {thing.shape!r}")


def real_images(texts: list[str], seed: int) -> NDArray[np.uint8]:
    """One real picture per caption.

    Args:
        texts: Captions of the grammar.
        seed: Picture i depends on (seed, i) only.

    Returns:
        uint8, [N, 32, 32, 3], RGB.

    Raises:
        ModelError: A caption is not of the grammar.
    """
    seeds = np.random.SeedSequence(seed).generate_state(len(texts))
    pictures = [render(parse_caption(t), int(s)) for t, s in zip(texts, seeds, strict=True)]
    return np.stack(pictures) if pictures else np.empty((0, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
