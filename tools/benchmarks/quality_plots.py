"""Plots of the quality table: error per row, error against the step, and a grid of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.figure import Figure

from qdexport.core.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.quality_store import RowStore

__all__ = ["plot_errors", "plot_pictures", "plot_steps"]

_INK: Final = "#30343b"
_BAR: Final = "#4477aa"
_COLOURS: Final = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222")
_PICTURES: Final = 8
_DPI: Final = 110


def plot_errors(rows: Mapping[str, Any], path: Path) -> bool:
    """Bars of the image MSE of all rows with their intervals; False when there is nothing to draw."""
    shown = [row for row in rows.values() if "mse" in row["scores"]]
    if not shown:
        return False
    figure = Figure(figsize=(8.5, 0.9 + 0.27 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    values = np.array([[row["scores"]["mse"][key] for key in ("value", "low", "high")] for row in shown])
    reach = np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]).clip(min=0)
    several = len({row["model"] for row in shown}) > 1
    labels = [f"{row['model']}: {row['title']}" if several else row["title"] for row in shown]
    axes.barh(labels, values[:, 0], xerr=reach, color=_BAR, error_kw={"ecolor": _INK, "capsize": 2, "lw": 1})
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("image MSE to FP on [-1, 1]")
    _plain(axes)
    _save(figure, path)
    return True


def plot_steps(rows: Mapping[str, Any], names: Sequence[str], path: Path) -> bool:
    """Error of the latents against the step, one line per row; False when there is nothing to draw."""
    shown = [rows[name] for name in names if name in rows and rows[name]["error_per_step"]]
    if not shown:
        return False
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, row in enumerate(shown):
        points = [(point["step"], point["mse"]) for point in row["error_per_step"] if point["mse"] > 0]
        steps, errors = zip(*points, strict=True)
        style = "-" if number < len(_COLOURS) else "--"
        axes.plot(steps, errors, style, color=_COLOURS[number % len(_COLOURS)], label=row["title"], lw=1.5)
    axes.set_yscale("log")
    axes.set_xlabel("steps done")
    axes.set_ylabel("squared error of the latents")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _plain(axes)
    _save(figure, path)
    return True


def plot_pictures(stores: Mapping[str, RowStore], titles: Mapping[str, str], path: Path) -> bool:
    """The first pictures of some rows, one line each; False when there is nothing to draw."""
    if not stores:
        return False
    columns = min(_PICTURES, *(len(store.job.prompts) for store in stores.values()))
    figure = Figure(figsize=(1.05 * columns + 2.0, 1.08 * len(stores) + 0.2), layout="constrained")
    grid = figure.subplots(len(stores), columns, squeeze=False)
    for line, (name, store) in zip(grid, stores.items(), strict=True):
        images = store.images()[:columns]
        for axes, image in zip(line, images, strict=True):
            axes.imshow(np.clip((np.moveaxis(image, 0, -1) + 1) / 2, 0, 1), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_visible(False)
        line[0].set_ylabel(
            titles[name].replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=8, color=_INK
        )
    _save(figure, path)
    return True


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="both", color="#dddddd", lw=0.5)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as partial:
        # no date and no version in the file: equal figures give equal files
        figure.savefig(partial, format="png", dpi=_DPI, metadata={"Software": None})
