"""The rows of the quality table: a data file of recipes and overrides, and what is compared with what."""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qdexport.core.recipe import Recipe, load_recipe, preset_names
from qdexport.errors import RecipeError

__all__ = [
    "METRICS",
    "Comparison",
    "Metric",
    "Row",
    "RowsFile",
    "choose_rows",
    "load_rows",
    "recipe_named",
    "resolve_rows",
]

Metric = Literal["mse", "psnr_db", "ssim", "alignment", "attributes", "frechet_fp", "frechet_real"]
METRICS: tuple[Metric, ...] = ("mse", "psnr_db", "ssim", "alignment", "attributes", "frechet_fp", "frechet_real")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RowEntry(_Part):
    """One row as the file states it; `recipe` names an entry of `recipes`, a preset, or nothing (FP)."""

    name: str
    title: str = ""
    group: str
    recipe: str | None = None
    set: dict[str, Any] = {}
    model: str = "shapes"
    images: int = Field(default=256, ge=2)
    noise_seed: int = Field(default=0, ge=0)
    first: dict[str, float] = Field(default={}, description="figures measured when the model was made")


class Comparison(_Part):
    """Two rows whose paired difference `row - against` is reported, over as many images as both have."""

    row: str
    against: str
    metrics: tuple[Metric, ...] = ("mse", "frechet_fp", "alignment")


class RowsFile(_Part):
    """The whole file.

    `pictures` and `traces` name rows for the picture grid and for the plot of the error against the step.
    """

    recipes: dict[str, dict[str, Any]] = {}
    presets: dict[str, Any] = Field(default={}, description="fields of the rows made for presets that have none")
    rows: tuple[RowEntry, ...] = Field(min_length=1)
    comparisons: tuple[Comparison, ...] = ()
    pictures: tuple[str, ...] = ()
    traces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row, ready to be measured.

    Attributes:
        name: unique.
        title: for tables.
        group: for `--group`.
        recipe: None for the floating-point model.
        source: what the recipe is, in words: its name and what was set.
        model: as `load_model` takes it.
        images: how many are sampled.
        noise_seed: the noise of image i comes from `noise_seed + i`.
        first: figures measured when the model was made, by metric.
    """

    name: str
    title: str
    group: str
    recipe: Recipe | None
    source: str
    model: str
    images: int
    noise_seed: int
    first: Mapping[str, float]

    @property
    def is_reference(self) -> bool:
        """Whether other rows of the same model are compared with this one."""
        return self.recipe is None and self.noise_seed == 0


def load_rows(path: Path) -> RowsFile:
    """Reads a file of rows; presets without a row of their own get one where the file asks for it.

    Raises:
        RecipeError: it cannot be read, has unknown keys, two rows of one name, or names a row that is not there.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows = RowsFile.model_validate(data)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"the file of rows {path} cannot be read: {error}") from error
    except ValidationError as error:
        raise RecipeError(f"the file of rows {path} is wrong: {error}") from error
    if rows.presets:
        bare = {row.recipe for row in rows.rows if not row.set}
        added = [_preset_row(name, rows.presets) for name in preset_names() if name not in bare]
        rows = rows.model_copy(update={"rows": (*rows.rows, *added)})
    _check(rows, path)
    return rows


def resolve_rows(rows: RowsFile, entries: Sequence[RowEntry] | None = None) -> list[Row]:
    """Loads the recipes of rows (all by default).

    Raises:
        RecipeError: a recipe that does not exist or cannot be used; the message names the row.
    """
    return [_resolve(entry, rows.recipes) for entry in (rows.rows if entries is None else entries)]


def choose_rows(rows: RowsFile, groups: Sequence[str], names: Sequence[str]) -> list[RowEntry]:
    """The rows of some groups and those whose names fit some globs, each model's FP row with them; no choice is all.

    Raises:
        RecipeError: a group or a glob that fits nothing.
    """
    known = list(dict.fromkeys(row.group for row in rows.rows))
    for group in groups:
        if group not in known:
            raise RecipeError(f"no rows are of the group {group!r}; there are {', '.join(known)}")
    for pattern in names:
        if not fnmatch.filter([row.name for row in rows.rows], pattern):
            raise RecipeError(f"no row is named {pattern!r}; --list shows all rows")
    if not groups and not names:
        return list(rows.rows)

    def wanted(row: RowEntry) -> bool:
        return row.group in groups or any(fnmatch.fnmatchcase(row.name, pattern) for pattern in names)

    models = {row.model for row in rows.rows if wanted(row)}
    return [row for row in rows.rows if wanted(row) or (_is_reference(row) and row.model in models)]


def _is_reference(row: RowEntry) -> bool:
    return row.recipe is None and row.noise_seed == 0


def _preset_row(name: str, fields: Mapping[str, Any]) -> RowEntry:
    return RowEntry.model_validate({"name": name, "recipe": name, **fields})


def _check(rows: RowsFile, path: Path) -> None:
    names = [row.name for row in rows.rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"{path} has two rows named {twice[0]!r}")
    named = [*rows.pictures, *rows.traces, *(name for pair in rows.comparisons for name in (pair.row, pair.against))]
    missing = [name for name in named if name not in names]
    if missing:
        raise RecipeError(f"{path} compares or shows {missing[0]!r}, but has no row of this name")
    for model in dict.fromkeys(row.model for row in rows.rows):
        references = [row.name for row in rows.rows if _is_reference(row) and row.model == model]
        if len(references) != 1:
            raise RecipeError(
                f"{path} must have one row without recipe and with noise_seed 0 for {model!r}; it has {len(references)}"
            )


def _resolve(entry: RowEntry, recipes: Mapping[str, dict[str, Any]]) -> Row:
    recipe, source = None, "floating point"
    if entry.recipe is not None:
        source = ", ".join([entry.recipe, *(f"{key}={value}" for key, value in entry.set.items())])
        try:
            recipe = recipe_named(str(entry.recipe), recipes, entry.set)
        except RecipeError as error:
            raise RecipeError(f"row {entry.name!r}: {error}") from error
    return Row(
        name=entry.name,
        title=entry.title or entry.name,
        group=entry.group,
        recipe=recipe,
        source=source,
        model=entry.model,
        images=entry.images,
        noise_seed=entry.noise_seed,
        first=entry.first,
    )


def recipe_named(name: str, recipes: Mapping[str, dict[str, Any]], changes: Mapping[str, Any]) -> Recipe:
    """A recipe of the file of rows, a preset or a .yaml file, with changes by dotted keys.

    Raises:
        RecipeError: there is none of this name, or it cannot be used.
    """
    if name not in recipes:
        return load_recipe(name, dict(changes))
    with tempfile.TemporaryDirectory(prefix="qdexport-rows-") as folder:
        path = Path(folder) / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, **recipes[name]}), encoding="utf-8")
        return load_recipe(str(path), dict(changes))
