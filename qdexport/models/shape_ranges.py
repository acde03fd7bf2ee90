"""From the sizes of a recipe to the dynamic dimensions of the network, and its optimization profiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qdexport.core.io_spec import Dim, Profile
from qdexport.core.recipe import ShapeProfile, Shapes
from qdexport.errors import RecipeError

__all__ = ["dims_of"]

SizeRange = int | tuple[int, int] | tuple[int, int, int]
_NAMES: Final = ("batch", "height", "width", "tokens")
_HALVED: Final = ("height", "width")


def dims_of(
    shapes: Shapes, own: Mapping[str, int | None], multiple: int
) -> tuple[dict[str, Dim], tuple[Profile, ...]]:
    """The ranges of the network by name, and its profiles.

    A range of the recipe is the network's, and every profile must lie in it. Where the recipe has a fixed size, the
    range is what the profiles make up together. With profiles, the best sizes are those of the first one.

    Args:
        shapes: of the recipe.
        own: the model's own sizes by name; only these names are dimensions of the network.
        multiple: what height and width must be multiples of.

    Raises:
        RecipeError: a range is out of order, a size is no multiple or unknown, a profile leaves its range, or names a
            dimension that the model has not.
    """
    columns = {name: _column(shapes, name, default, multiple) for name, default in own.items()}
    for key, entry in _named(shapes):
        foreign = [name for name in _NAMES if name not in own and getattr(entry, name) is not None]
        if foreign:
            raise RecipeError(f"shapes.profiles: profile {key!r} sets {foreign[0]}, which this denoiser does not have")
    dims = {name: whole for name, (whole, _) in columns.items()}
    dynamic = [name for name, dim in dims.items() if dim.dynamic]
    if shapes.profiles and not dynamic:
        raise RecipeError("shapes.profiles have one and the same shape; remove them, or give them ranges")
    profiles = (
        Profile(name=key, dims=tuple(columns[name][1][index] for name in dynamic))
        for index, (key, _) in enumerate(_named(shapes))
    )
    return dims, tuple(profiles)


def _named(shapes: Shapes) -> list[tuple[str, ShapeProfile]]:
    return list(zip(shapes.profile_names, shapes.profiles, strict=True))


def _column(shapes: Shapes, name: str, default: int | None, multiple: int) -> tuple[Dim, list[Dim]]:
    """One dimension: its range in the network, and in every profile."""
    value: SizeRange | None = getattr(shapes, name)
    value = default if value is None else value
    own = None if value is None else _dim(name, name, value, default or 0, multiple)
    parts = []
    for key, entry in _named(shapes):
        size: SizeRange | None = getattr(entry, name)
        part = own if size is None else _dim(f"profiles.{key}.{name}", name, size, own.best if own else 0, multiple)
        if part is None:
            raise RecipeError(f"profile {key!r} has no {name}, nor has the model's config; set shapes.{name}")
        if own is not None and own.dynamic and not own.low <= part.low <= part.high <= own.high:
            raise RecipeError(
                f"shapes.profiles.{key}.{name} is {part.low} to {part.high}, outside shapes.{name}, {own.low} to "
                f"{own.high}; widen that range"
            )
        parts.append(part)
    if own is None and not parts:
        raise RecipeError(f"the model's config has no sample_size; set shapes.{name} in the recipe")
    whole = [own] if own is not None and (own.dynamic or not parts) else parts
    low, high = min(part.low for part in whole), max(part.high for part in whole)
    return Dim(name=name, low=low, best=(parts or whole)[0].best, high=high), parts


def _dim(where: str, name: str, value: SizeRange, default: int, multiple: int) -> Dim:
    if isinstance(value, int):
        value = (value, value, value)
    low, high = value[0], value[-1]
    best = value[1] if len(value) == 3 else min(max(default, low), high)
    if not 1 <= low <= best <= high:
        raise RecipeError(
            f"shapes.{where} is {list(value)}; give low, best and high in ascending order, from 1 up"
        )
    odd = [size for size in (low, best, high) if size % multiple]
    if name in _HALVED and odd:
        raise RecipeError(f"shapes.{where} is {odd[0]}; this denoiser needs a multiple of {multiple}")
    return Dim(name=name, low=low, best=best, high=high)
