"""Groups of sampling steps that share a row of the step tables, found by clustering under an error budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage

from qdexport.core.recipe import StepGroups

__all__ = ["group_steps", "sharing_cost", "uniform_groups"]


def uniform_groups(steps: int, count: int) -> tuple[int, ...]:
    """The group of every step: equal stretches of the schedule."""
    groups = min(count, steps)
    return tuple(step * groups // steps for step in range(steps))


def group_steps(low: NDArray[np.float64], high: NDArray[np.float64], settings: StepGroups) -> tuple[int, ...]:
    """Groups the steps of a schedule.

    Steps whose ranges are alike in all layers are clustered (average linkage over the logarithms of the two ends).
    Of all levels of the tree the one with the fewest groups is taken whose
    :func:`sharing_cost` is within the budget. What the paper (EMF) does is not published; this is our choice.

    Args:
        low: ends of the ranges, ``[steps, layers]``, 0 or less.
        high: other ends, same shape, 0 or more.
        settings: how.

    Returns:
        The group of every step, numbered in the order of their first steps.
    """
    steps = len(low)
    if settings.method == "uniform":
        return uniform_groups(steps, settings.count or steps)
    if steps == 1:
        return (0,)
    tree = linkage(_features(low, high), method="average")
    limit = min(settings.count or steps, steps)
    for count in range(1, limit + 1):
        groups = _in_order(fcluster(tree, count, criterion="maxclust"))
        if sharing_cost(low, high, groups) <= settings.budget:
            return groups
    return _in_order(fcluster(tree, limit, criterion="maxclust"))


def sharing_cost(low: NDArray[np.float64], high: NDArray[np.float64], groups: Sequence[int]) -> float:
    """How much the squared rounding error grows when steps share rows, as a share of what it is with a row each.

    The error of a uniform quantizer is ``scale^2 / 12``, and a group's range is the union of its steps'. Steps and
    layers count alike: the mean over both of the relative growth. An input that is always zero in a step costs
    nothing there, since every quantizer has an exact 0.
    """
    index = np.asarray(groups)
    width = high - low
    growth = np.zeros_like(width)
    for group in range(int(index.max()) + 1):
        members = index == group
        shared = high[members].max(axis=0) - low[members].min(axis=0)
        own = width[members]
        growth[members] = np.divide(shared, own, out=np.ones_like(own), where=own > 0) ** 2 - 1
    return float(growth.mean())


def _features(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    width = np.maximum(high - low, np.finfo(np.float64).tiny)
    # an end at 0 has no logarithm: a thousandth of the width is nothing to a quantizer of 8 bits
    ends = [np.log(np.maximum(end, 1e-3 * width)) for end in (-low, high)]
    return np.concatenate(ends, axis=1)


def _in_order(labels: NDArray[np.integer]) -> tuple[int, ...]:
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(int(label), len(numbers)) for label in labels)
