"""The solver against brute force; fronts, and what cannot be solved."""

from __future__ import annotations

import ctypes
import itertools
import math

import numpy as np
import pytest

from microscale.errors import AllocationError
from microscale.planning import (
    Choice,
    ChoiceGroup,
)
from microscale.planning.allocation import _quiet_output, allocate, front, largest_cost, least_cost


def random_groups(seed: int, groups: int, *, is_whole: bool) -> list[ChoiceGroup]:
    randomness = np.random.default_rng(seed)
    found: list[ChoiceGroup] = []
    for place in range(groups):
        costs = randomness.integers(1, 40, 4) * 1024.0 if is_whole else randomness.uniform(0.001, 2.0, 4)
        harms = randomness.lognormal(-12, 3, 4)
        choices = [
            Choice(candidate=c, sensitivity=float(harms[c]), cost=float(costs[c])) for c in range(4 if place % 3 else 2)
        ]
        found.append(ChoiceGroup(names=(f"layer{place}",), choices=tuple(choices)))
    return found


def brute_force(groups: list[ChoiceGroup], budget: float) -> float:
    """Return the least summed sensitivity of all combinations within the budget."""
    sums = [
        (math.fsum(c.cost for c in combination), math.fsum(c.sensitivity for c in combination))
        for combination in itertools.product(*(group.choices for group in groups))
    ]
    return min(harm for cost, harm in sums if cost <= budget * (1 + 1e-12))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("is_whole", [True, False])
def test_the_answer_is_the_optimum(seed: int, is_whole: bool) -> None:
    groups = random_groups(seed, 6, is_whole=is_whole)
    low, high = least_cost(groups), max(largest_cost(groups), least_cost(groups))
    for share in (0.0, 0.1, 0.37, 0.5, 0.83, 1.0, 1.2):
        budget = low + share * (high - low)
        found = allocate(groups, budget)
        assert found.cost <= budget * (1 + 1e-9)
        assert found.sensitivity == pytest.approx(brute_force(groups, budget), rel=1e-9)


def test_what_the_solver_prints_is_thrown_away(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS leaves remarks on standard output, through the buffer of C; a command prints its JSON there."""
    library = ctypes.CDLL(None)
    library.puts(b"before")
    with _quiet_output():
        library.puts(b"a remark")
    library.puts(b"after")
    library.fflush(None)
    words = capfd.readouterr().out.split("\n")
    assert "before" in words and "after" in words and "a remark" not in words


def test_a_front_falls_and_has_no_point_twice() -> None:
    points = front(random_groups(1, 5, is_whole=True), 30)
    assert len(points) > 4
    for one, other in itertools.pairwise(points):
        assert other.cost > one.cost and other.sensitivity < one.sensitivity


def test_what_cannot_be_solved() -> None:
    groups = random_groups(2, 3, is_whole=True)
    with pytest.raises(AllocationError, match="smallest possible cost"):
        allocate(groups, least_cost(groups) * 0.99)
    broken = ChoiceGroup(names=("down",), choices=(Choice(candidate=0, sensitivity=math.nan, cost=1.0),))
    with pytest.raises(AllocationError, match="down is not finite"):
        allocate([*groups, broken], 1e9)
