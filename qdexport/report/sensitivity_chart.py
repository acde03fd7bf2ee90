"""Charts of bit allocation: the sensitivity of every layer per width, and the scan of plans."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from qdexport.core.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from qdexport.quant.allocation import ScannedPlan
    from qdexport.quant.sensitivity_table import LayerSensitivity, SensitivityTable

__all__ = ["save_scan_chart", "save_sensitivity_chart"]

_COLOURS = {2: "#b3261e", 3: "#c4622d", 4: "#d68b00", 5: "#8a8f2a", 6: "#4f8f5b", 7: "#3f87a6", 8: "#1f5fa8"}
_INK, _GRID = "#1c2028", "#d9dde3"
_ROW_INCHES, _TOP_INCHES, _BOTTOM_INCHES, _WIDTH_INCHES = 0.16, 0.4, 0.5, 14.0
_LABELS = {"sqnr_db": "SQNR of the denoiser's output (dB)", "ssim": "1 - SSIM of the images"}
_TITLES = {"content": "content layers", "quality": "quality layers"}
_SMALLEST_LOSS = 1e-7  # of SSIM: FP32 knows no less
_FACE: Any = {"font.size": 7, "axes.edgecolor": _INK, "text.color": _INK, "axes.labelcolor": _INK, "figure.dpi": 120}


def save_sensitivity_chart(path: Path, table: SensitivityTable) -> None:
    """Writes a PNG: one panel per group and part, one row per layer, the most sensitive on top, one mark per width.

    Args:
        path: is replaced.
        table: of a sweep.
    """
    panels = [
        (group, part, _sorted(table, group, part))
        for group in ("quality", "content")
        for part in ("weight", "activation")
    ]
    groups = [[panel for panel in panels if panel[0] == group and panel[2]] for group in ("quality", "content")]
    rows = [panel for panel in groups if panel]
    heights = [_TOP_INCHES + _BOTTOM_INCHES + _ROW_INCHES * max(len(entries) for _, _, entries in row) for row in rows]
    with _pyplot() as plt:
        figure = plt.figure(figsize=(_WIDTH_INCHES, sum(heights) + 0.5))
        outer = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)
        for place, row, height in zip(outer[:, 0], rows, heights, strict=True):
            axes = place.subplots(1, len(row), squeeze=False)[0]
            for axis, (group, part, entries) in zip(axes, row, strict=True):
                _draw_layers(axis, entries, f"{_TITLES[group]}, {part}s")
            left = 0.27 if len(row) == 1 else 0.22
            place.subplots_adjust(
                left=left, right=0.99, wspace=0.85, top=1 - _TOP_INCHES / height, bottom=_BOTTOM_INCHES / height
            )
        figure.suptitle(f"{table.model}: one layer quantized, all others in floating point", fontsize=9, y=0.999)
        _save(figure, path)


def save_scan_chart(path: Path, scanned: Sequence[ScannedPlan]) -> None:
    """Writes a PNG: average width against the split of the budget, with the pixel error of the compared plans.

    Args:
        path: is replaced.
        scanned: all plans of the scans.
    """
    parts = list(dict.fromkeys(plan.part for plan in scanned))
    with _pyplot() as plt:
        figure, grid = plt.subplots(1, len(parts), figsize=(6.2 * len(parts), 4.2), squeeze=False)
        for axis, part in zip(grid[0], parts, strict=True):
            _draw_scan(axis, figure, [plan for plan in scanned if plan.part == part])
            axis.set_title(f"{part}s: {sum(plan.part == part for plan in scanned)} plans", loc="left")
        figure.tight_layout()
        _save(figure, path)


def _sorted(table: SensitivityTable, group: Any, part: Any) -> list[LayerSensitivity]:
    return sorted(table.of(part, group), key=lambda entry: entry.values[min(entry.values)])


def _draw_layers(axis: Any, entries: Sequence[LayerSensitivity], title: str) -> None:
    metric = entries[0].metric
    places = range(len(entries))
    for bits in sorted({bits for entry in entries for bits in entry.values}):
        shown = [
            (place, entry.values[bits]) for place, entry in zip(places, entries, strict=True) if bits in entry.values
        ]
        values = [max(1 - value, _SMALLEST_LOSS) if metric == "ssim" else value for _, value in shown]
        axis.plot(values, [place for place, _ in shown], "o", ms=3, color=_COLOURS[bits], label=f"{bits} bits")
    if metric == "ssim":
        axis.set_xscale("log")
    axis.set_yticks(list(places), [entry.name for entry in entries], fontsize=5.5)
    axis.set_ylim(len(entries) - 0.5, -0.5)
    axis.grid(color=_GRID, lw=0.5)
    axis.set_axisbelow(True)
    axis.set_xlabel(_LABELS[metric])
    axis.set_title(title, loc="left", fontsize=8)
    axis.legend(loc="best", fontsize=6, framealpha=0.8)


def _draw_scan(axis: Any, figure: Any, plans: Sequence[ScannedPlan]) -> None:
    axis.plot([p.split for p in plans], [p.average_bits for p in plans], "o", ms=3, color=_GRID, label="in the scan")
    compared = [plan for plan in plans if plan.mse is not None]
    if compared:
        from matplotlib.colors import LogNorm

        errors = [plan.mse or 1e-12 for plan in compared]
        marks = axis.scatter(
            [p.split for p in compared], [p.average_bits for p in compared], c=errors, cmap="viridis_r", s=36, zorder=3,
            norm=LogNorm(min(errors), max(errors) * 1.0001), label="compared on images",
        )  # fmt: skip
        figure.colorbar(marks, ax=axis, label="mean squared pixel error to the floating-point images")
    best = [plan for plan in plans if plan.chosen]
    axis.plot(
        [p.split for p in best], [p.average_bits for p in best], "o", ms=11, mfc="none", mec="#b3261e", label="taken"
    )
    axis.set_xlabel("budget of content layers / budget of quality layers")
    axis.set_ylabel("average bits")
    axis.grid(color=_GRID, lw=0.5)
    axis.set_axisbelow(True)
    axis.legend(loc="best", fontsize=6)


@contextlib.contextmanager
def _pyplot() -> Iterator[Any]:
    """Pyplot without a window, in the report's colours; its figures are closed afterwards."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with mpl.rc_context(_FACE):
        yield plt
        plt.close("all")


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png")
