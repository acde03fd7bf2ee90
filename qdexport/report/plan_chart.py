"""Picture of a plan's predicted costs: where the time goes, and what bounds the slowest kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qdexport.core.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qdexport.build.plan_cost import KernelCost, PlanCost

__all__ = ["save_plan_chart"]

_COLOURS = {
    "convolution": "#1f5fa8",
    "product": "#3f87a6",
    "attention": "#4f8f5b",
    "pointwise": "#d68b00",
    "quantize": "#b3261e",
    "widen": "#8a3f8f",
    "copy": "#8a8f99",
}
_INK, _GRID = "#1c2028", "#d9dde3"
_FACE: Any = {"font.size": 7, "axes.edgecolor": _INK, "text.color": _INK, "axes.labelcolor": _INK, "figure.dpi": 120}
_SLOWEST = 30
_MICRO = 1e6


def save_plan_chart(path: Path, cost: PlanCost) -> None:
    """Writes a PNG: the kernels on the roofline, seconds by role, and the slowest kernels with both of their times.

    Args:
        path: is replaced.
        cost: of a plan on one GPU.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    slowest = sorted(cost.kernels, key=lambda kernel: -kernel.seconds)[:_SLOWEST]
    with mpl.rc_context(_FACE):
        figure = plt.figure(figsize=(13, 3.4 + 0.17 * len(slowest)), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=[2.6, 0.17 * len(slowest) + 0.6])
        _draw_roofline(figure.add_subplot(grid[0, 0]), cost)
        _draw_roles(figure.add_subplot(grid[0, 1]), cost)
        _draw_slowest(figure.add_subplot(grid[1, :]), slowest)
        figure.suptitle(
            f"{cost.gpu.name}: {len(cost.kernels)} kernels, at best {cost.seconds * 1e3:.3g} ms per denoiser call "
            "(roofline, not measured; launches and caches left out)",
            fontsize=9,
        )
        with atomic_path(path) as partial:
            figure.savefig(partial, format="png", metadata={"Software": "qdexport"})
        plt.close(figure)


def _draw_roofline(axis: Any, cost: PlanCost) -> None:
    matrix = [kernel for kernel in cost.kernels if kernel.operations]
    for role in dict.fromkeys(kernel.role for kernel in matrix):
        chosen = [kernel for kernel in matrix if kernel.role == role]
        axis.plot(
            [kernel.operations / kernel.bytes for kernel in chosen],
            [kernel.operations / kernel.seconds for kernel in chosen],
            "o",
            ms=4,
            alpha=0.6,
            color=_COLOURS[role],
            label=role,
        )
    for dtype in dict.fromkeys(kernel.dtype for kernel in matrix):
        axis.axhline(cost.gpu.rate(dtype), color=_INK, lw=0.6, ls=":")
        axis.annotate(f"peak {dtype}", (1, cost.gpu.rate(dtype)), xycoords=("axes fraction", "data"), ha="right")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte")
    axis.set_ylabel("operations per second, at best")
    axis.set_title("matrix kernels", loc="left", fontsize=8)
    _finish(axis)


def _draw_roles(axis: Any, cost: PlanCost) -> None:
    sums = cost.seconds_by_role()
    axis.barh(range(len(sums)), [value * _MICRO for value in sums.values()], color=[_COLOURS[role] for role in sums])
    counts = {role: sum(kernel.role == role for kernel in cost.kernels) for role in sums}
    axis.set_yticks(range(len(sums)), [f"{role} ({counts[role]})" for role in sums])
    axis.invert_yaxis()
    axis.set_xlabel("microseconds per denoiser call, at best")
    axis.set_title("kernels by what they do", loc="left", fontsize=8)
    axis.grid(color=_GRID, lw=0.5, axis="x")
    axis.set_axisbelow(True)


def _draw_slowest(axis: Any, slowest: Sequence[KernelCost]) -> None:
    places = range(len(slowest))
    axis.barh(
        places, [k.seconds * _MICRO for k in slowest], color=[_COLOURS[k.role] for k in slowest], height=0.75
    )
    axis.plot([k.compute_seconds * _MICRO for k in slowest], places, "|", color=_INK, ms=7, label="compute alone")
    axis.plot([k.memory_seconds * _MICRO for k in slowest], places, "x", color=_INK, ms=4, label="memory alone")
    axis.set_yticks(places, [f"{k.module or k.name} [{k.role}]" for k in slowest], fontsize=5.5)
    axis.invert_yaxis()
    axis.set_xlabel("microseconds, at best")
    axis.set_title("slowest kernels", loc="left", fontsize=8)
    _finish(axis)


def _finish(axis: Any) -> None:
    axis.grid(color=_GRID, lw=0.5)
    axis.set_axisbelow(True)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best", fontsize=6)
