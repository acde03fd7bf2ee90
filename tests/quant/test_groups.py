"""Groups of steps that share a row of the step tables."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qdexport.core.recipe import StepGroups
from qdexport.quant.groups import group_steps, sharing_cost, uniform_groups

Ends = tuple[NDArray[np.float64], NDArray[np.float64]]


def _ends(width: NDArray[np.float64]) -> Ends:
    """Symmetric ranges of some widths, ``[steps, layers]``."""
    return -width / 2, width / 2


def test_uniform_groups_are_equal_stretches() -> None:
    assert uniform_groups(6, 3) == (0, 0, 1, 1, 2, 2)
    assert uniform_groups(5, 2) == (0, 0, 0, 1, 1)
    assert uniform_groups(3, 8) == (0, 1, 2)
    low, high = _ends(np.array([[1.0], [9.0], [1.0], [9.0]]))
    assert group_steps(low, high, StepGroups(method="uniform", count=2)) == (0, 0, 1, 1)  # whatever the ranges


def test_sharing_cost_by_hand() -> None:
    low = np.array([[-1.0, 0.0], [-2.0, 0.0], [0.0, -3.0]])
    high = np.array([[1.0, 4.0], [0.0, 2.0], [1.0, 3.0]])
    assert sharing_cost(low, high, (0, 1, 2)) == 0
    # steps 0 and 1 share [-2, 1] (widths 2 and 2) and [0, 4] (widths 4 and 2); step 2 stands alone
    growth = [(3 / 2) ** 2 - 1, (3 / 2) ** 2 - 1, 0, (4 / 2) ** 2 - 1, 0, 0]
    assert sharing_cost(low, high, (0, 0, 1)) == pytest.approx(sum(growth) / 6, rel=1e-12)


def test_sharing_cost_is_the_growth_of_the_rounding_error(noise: np.random.Generator) -> None:
    """Uniform data, rounded with a range per step and with a shared one."""
    low, high = np.array([[-1.0], [-0.3]]), np.array([[1.0], [0.9]])

    def error(step: int, ends: tuple[float, float]) -> float:
        x = noise.uniform(low[step, 0], high[step, 0], 200_000)
        scale = (ends[1] - ends[0]) / 255
        return float(np.square(x - np.rint(x / scale) * scale).mean())

    own = [error(step, (low[step, 0], high[step, 0])) for step in range(2)]
    shared = [error(step, (-1.0, 1.0)) for step in range(2)]
    grown = np.mean([after / before - 1 for after, before in zip(shared, own, strict=True)])
    # the mean square of 200,000 uniform errors deviates by 0.9 / sqrt(200,000) = 0.2 %; four of them, three sigma:
    # 2 % of ratios between 1 and 3
    assert sharing_cost(low, high, (0, 0)) == pytest.approx(grown, abs=0.02)


def test_an_input_that_is_always_zero_costs_nothing() -> None:
    """0 is exact with every scale: a dead input must neither forbid sharing nor pay for others."""
    width = np.array([[2.0, 0.0], [3.0, 0.0], [2.0, 5.0]])
    low, high = _ends(width)
    alive = sharing_cost(*_ends(width[:, :1]), (0, 0, 0))
    # of the second input only the last step has values, and its range is its own
    assert sharing_cost(low, high, (0, 0, 0)) == pytest.approx(alive / 2, rel=1e-12)
    assert group_steps(*_ends(np.zeros((3, 2))), StepGroups()) == (0, 0, 0)


@pytest.mark.parametrize("budget", [0.02, 0.1])
def test_planted_groups_are_found(noise: np.random.Generator, budget: float) -> None:
    planted = np.array([0, 0, 1, 1, 0, 2, 2, 1])  # not neighbours alone
    centres = np.exp(noise.normal(0, 1.5, (3, 10)))
    low, high = _ends(centres[planted] * np.exp(noise.normal(0, 0.002, (8, 10))))
    assert group_steps(low, high, StepGroups(budget=budget)) == (0, 0, 1, 1, 0, 2, 2, 1)


def test_the_two_ends_count_each() -> None:
    """Equal widths, but shifted."""
    low, high = np.array([[-4.0], [-1.0], [-4.0]]), np.array([[1.0], [4.0], [1.0]])
    assert group_steps(low, high, StepGroups(budget=0.01)) == (0, 1, 0)


def test_budget_zero_shares_equal_rows_alone(noise: np.random.Generator) -> None:
    width = np.exp(noise.normal(0, 0.5, (6, 4)))
    width[4] = width[1]
    assert group_steps(*_ends(width), StepGroups(budget=0)) == (0, 1, 2, 3, 1, 4)
    assert group_steps(*_ends(width[:4]), StepGroups(budget=0)) == (0, 1, 2, 3)


def test_budget_is_kept_with_the_fewest_groups(noise: np.random.Generator) -> None:
    low, high = _ends(np.exp(np.linspace(0, 2, 20))[:, None] * np.exp(noise.normal(0, 0.05, (20, 6))))
    counts = []
    for budget in (0.01, 0.05, 0.3, 2.0, 100.0):
        groups = group_steps(low, high, StepGroups(budget=budget))
        assert sharing_cost(low, high, groups) <= budget
        counts.append(max(groups) + 1)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] > counts[-1] == 1


def test_count_limits_clustered_groups(noise: np.random.Generator) -> None:
    low, high = _ends(np.exp(noise.normal(0, 1, (10, 3))))
    groups = group_steps(low, high, StepGroups(budget=0, count=3))
    assert max(groups) + 1 == 3
    assert sharing_cost(low, high, groups) > 0  # the count goes before the budget
    assert max(group_steps(low, high, StepGroups(budget=1e9, count=3))) == 0


def test_numbers_follow_first_steps(noise: np.random.Generator) -> None:
    groups = group_steps(*_ends(np.exp(noise.normal(0, 1, (12, 3)))), StepGroups(budget=0.5))
    first = [groups.index(group) for group in range(max(groups) + 1)]
    assert first == sorted(first)


def test_one_step() -> None:
    assert group_steps(*_ends(np.ones((1, 2))), StepGroups()) == (0,)
