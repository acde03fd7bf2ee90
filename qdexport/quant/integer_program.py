"""The integer program of MixDQ's bit allocation: one width per layer, the largest summed score within a budget.

``max sum S[l, b] c[l, b]``, ``c`` binary, ``sum_b c[l, b] = 1``, ``low <= sum cost[l, b] c[l, b] <= high`` per budget
row; solved by HiGHS through scipy. Content and quality layers are separate problems, because SSIM and dB cannot be
added; how the budget is split between them is scanned.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from qdexport.quant.sensitivity_table import Group

__all__ = ["BAND_BITS", "Budget", "Choice", "Problem", "ScanPoint", "reachable", "scan", "solve", "split_budget"]

logger = logging.getLogger(__name__)

BAND_BITS = 0.02  # half the width of the band that an average may lie in
_INFEASIBLE, _TIME_LIMIT = 2, 1
_SECONDS = 60.0  # for one problem; those of 800 layers take less than one
_RELATIVE_GAP = 1e-4  # of the summed losses
_ENDS = (np.min, np.max)
_ROW_TOLERANCE = 1e-6  # HiGHS's own
_SCORE_SPAN = 1e3  # HiGHS ends at an absolute gap of 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One layer, or one activation: what it can be given.

    Attributes:
        name: layer or activation group.
        scores: how well it does, by width; one entry fixes it.
        costs: by width, one number per budget row.
    """

    name: str
    scores: Mapping[int, float]
    costs: Mapping[int, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bounds of every budget row: the same for all of them."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Weights, or activations, of the two groups.

    Attributes:
        content: choices of content layers; their costs add up to the group's own average or share.
        quality: the same of quality layers.
        ratio: size of the content group over that of the quality group (methods.md 2.1(d): rho).
        band: for averages of bits, the budget is a band; a share of bytes or time is an upper bound.
    """

    content: Sequence[Choice]
    quality: Sequence[Choice]
    ratio: float
    band: bool

    def budget(self, level: float) -> Budget:
        """The budget of one group at an average or a share."""
        if self.band:
            # HiGHS keeps rows up to its tolerance: a little inside, so that the band itself is kept
            return Budget(low=level - BAND_BITS + _ROW_TOLERANCE, high=level + BAND_BITS - _ROW_TOLERANCE)
        return Budget(low=-math.inf, high=level)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanPoint:
    """One solution of the scan.

    Attributes:
        level: average or share over both groups that was asked for.
        split: budget of the content group over that of the quality group.
        widths: by layer or activation group.
        scores: summed scores of the two groups.
    """

    level: float
    split: float
    widths: Mapping[str, int]
    scores: Mapping[Group, float]


def solve(choices: Sequence[Choice], budget: Budget) -> dict[str, int] | None:
    """The widths of largest summed score within the budget; None when nothing is within it.

    Args:
        choices: one width is chosen for each.
        budget: bounds of every row of costs.
    """
    if not choices:
        return {}
    pairs = [(index, bits) for index, choice in enumerate(choices) for bits in sorted(choice.scores)]
    # a layer's best score is taken off and the losses are scaled: the optimum is the same, the gap is not
    losses = np.array([max(choices[i].scores.values()) - choices[i].scores[bits] for i, bits in pairs])
    span = float(losses.max())
    one_each = csr_array((np.ones(len(pairs)), ([i for i, _ in pairs], range(len(pairs)))))
    rows = np.array([choices[i].costs[bits] for i, bits in pairs], dtype=np.float64).T
    least, most = (np.sum([end(list(choice.costs.values()), axis=0) for choice in choices], axis=0) for end in _ENDS)
    if (least > budget.high + _ROW_TOLERANCE).any() or (most < budget.low - _ROW_TOLERANCE).any():
        return None  # most points of a scan: HiGHS would take much longer to say so
    found = milp(
        losses * (_SCORE_SPAN / span if span > 0 else 1.0),
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(rows, budget.low, budget.high)],
        # no presolve: no slower here, and its way back to the full problem prints to stdout
        options={"mip_rel_gap": _RELATIVE_GAP, "time_limit": _SECONDS, "presolve": False},
    )
    if found.x is None:
        if found.status not in (_INFEASIBLE, _TIME_LIMIT):
            raise RuntimeError(f"HiGHS could not solve a bit allocation: {found.message}")
        return None
    if found.status == _TIME_LIMIT:
        logger.warning("a bit allocation of %d layers is not proven optimal after %.0f s", len(choices), _SECONDS)
    return {choices[i].name: bits for (i, bits), chosen in zip(pairs, found.x, strict=True) if chosen > 0.5}


def split_budget(level: float, ratio: float, split: float) -> tuple[float, float]:
    """Budgets of the content and the quality group whose size-weighted mean is ``level``.

    ``quality = level (1 + rho) / (k rho + 1)``, ``content = k quality`` (methods.md 2.1(d)).
    """
    quality = level * (1 + ratio) / (split * ratio + 1)
    return split * quality, quality


def scan(
    problem: Problem, levels: Sequence[float], splits: Sequence[float], on_point: Callable[[], None] | None = None
) -> list[ScanPoint]:
    """Solves both groups for every level and split; points without a solution are left out, equal ones kept once.

    Args:
        problem: the two groups; when one is empty the other gets the whole budget.
        levels: averages or shares, ascending.
        splits: of the budget.
        on_point: called after each pair of level and split.
    """
    alone = not problem.content or not problem.quality
    points: dict[tuple[tuple[str, int], ...], ScanPoint] = {}
    for level in levels:
        for split in [1.0] if alone else splits:
            content, quality = (level, level) if alone else split_budget(level, problem.ratio, split)
            found = [
                solve(problem.content, problem.budget(content)),
                solve(problem.quality, problem.budget(quality)),
            ]
            if on_point is not None:
                on_point()
            if found[0] is None or found[1] is None:
                continue
            widths = {**found[0], **found[1]}
            scores: dict[Group, float] = {
                "content": _score(problem.content, widths),
                "quality": _score(problem.quality, widths),
            }
            points.setdefault(
                tuple(sorted(widths.items())), ScanPoint(level=level, split=split, widths=widths, scores=scores)
            )
    return list(points.values())


def reachable(problem: Problem) -> tuple[float, float]:
    """The least and the largest average or share over both groups, whatever the scores."""
    share = problem.ratio / (1 + problem.ratio) if problem.content and problem.quality else 1.0
    ends = []
    for end in (min, max):
        content, quality = (
            max(sum(end(cost[row] for cost in choice.costs.values()) for choice in group) for row in _rows(group))
            if group
            else 0.0
            for group in (problem.content, problem.quality)
        )
        if problem.content and problem.quality:
            ends.append(share * content + (1 - share) * quality)
        else:
            ends.append(content + quality)
    return ends[0], ends[1]


def _rows(group: Sequence[Choice]) -> range:
    return range(len(next(iter(group[0].costs.values()))))


def _score(group: Sequence[Choice], widths: Mapping[str, int]) -> float:
    return float(sum(choice.scores[widths[choice.name]] for choice in group))
