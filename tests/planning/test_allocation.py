"""The solver against brute force; fronts, and what cannot be solved."""

from __future__ import annotations

import ctypes
import itertools
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microscale.errors import AllocationError, DependencyError
from microscale.planning.allocation import (
    Choice,
    ChoiceGroup,
    _quiet_output,
    _scaled_costs,
    allocation_front,
    best_allocation,
    largest_cost,
    least_cost,
)


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
        found = best_allocation(groups, budget)
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
    points = allocation_front(random_groups(1, 5, is_whole=True), 30)
    assert len(points) > 4
    for one, other in itertools.pairwise(points):
        assert other.cost > one.cost and other.sensitivity < one.sensitivity


def test_what_cannot_be_solved() -> None:
    groups = random_groups(2, 3, is_whole=True)
    with pytest.raises(AllocationError, match="smallest possible cost"):
        best_allocation(groups, least_cost(groups) * 0.99)
    broken = ChoiceGroup(names=("down",), choices=(Choice(candidate=0, sensitivity=math.nan, cost=1.0),))
    with pytest.raises(AllocationError, match="down is not finite"):
        best_allocation([*groups, broken], 1e9)


def group(*pairs: tuple[float, float], name: str = "layer") -> ChoiceGroup:
    """A group of candidates (sensitivity, cost)."""
    choices = [Choice(candidate=c, sensitivity=harm, cost=cost) for c, (harm, cost) in enumerate(pairs)]
    return ChoiceGroup(names=(name,), choices=tuple(choices))


PAIRS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=3)


@settings(max_examples=60)
@given(st.lists(PAIRS, max_size=4), st.integers(0, 90))
def test_small_problems_by_brute_force(problem: list[list[tuple[int, int]]], budget: int) -> None:
    """Ties, zeros, single candidates and no group at all; a budget that no choice meets is refused."""
    groups = [group(*pairs) for pairs in problem]
    if budget < least_cost(groups):
        with pytest.raises(AllocationError, match="smallest possible cost"):
            best_allocation(groups, budget)
        return
    found = best_allocation(groups, budget)
    assert found.cost <= budget and found.sensitivity == brute_force(groups, budget)
    assert all(choice in one.choices for choice, one in zip(found.chosen, groups, strict=True))


def test_sums_and_limits_by_hand() -> None:
    groups = [group((5, 1), (0, 9), (0, 7)), group((3, 2), (1, 4))]
    assert least_cost(groups) == 3 and largest_cost(groups) == 11  # of two best choices the cheaper one
    assert least_cost([]) == largest_cost([]) == 0 and best_allocation([], 0).chosen == ()
    found = best_allocation(groups, 9)
    assert [choice.candidate for choice in found.chosen] == [2, 0] and (found.cost, found.sensitivity) == (9, 3)
    assert [choice.candidate for choice in best_allocation(groups, 3).chosen] == [0, 0]
    assert [choice.candidate for choice in best_allocation(groups, 1e30).chosen] == [2, 1]


def test_a_budget_that_rounding_lost_is_met() -> None:
    """0.1 + 0.2 is a little more than 0.3, which is no reason to refuse 0.3."""
    groups = [group((1, 0.1), (0, 5)), group((1, 0.2), (0, 5))]
    assert best_allocation(groups, 0.3).sensitivity == 2
    with pytest.raises(AllocationError, match=r"the smallest possible cost is 0\.3, the budget 0\.299"):
        best_allocation(groups, 0.299)


@pytest.mark.parametrize("harm", [math.nan, math.inf, -math.inf])
def test_sensitivities_that_are_not_finite(harm: float) -> None:
    with pytest.raises(AllocationError) as caught:
        best_allocation([group((1, 1)), group((1, 1), (harm, 2), name="up")], 10)
    assert str(caught.value) == (
        "the sensitivity of up is not finite: the model overflows with one of the candidates;"
        " leave that format out, or check the model"
    )


@pytest.mark.parametrize(
    ("costs", "limit", "scaled", "bound"),
    [
        ([4096.0, 6144.0], 10240.0, [2, 3], 5.5),  # a divisor of 2048; half a unit of room
        ([4096.0, 6144.0], 10239.0, [2, 3], 4.5),
        ([0.0, 0.0], 5.0, [0, 0], 5.5),
        ([0.5, 1.5], 2.0, [250_000, 750_000], 1e6),
        ([3.0, 3.0 * 2**51], 3.0 * 2**51, [1e6 / 2**51, 1e6], 1e6),  # whole, but too large to count
    ],
)
def test_costs_in_units_of_the_solver(costs: list[float], limit: float, scaled: list[float], bound: float) -> None:
    found, most = _scaled_costs(costs, limit)
    assert found.tolist() == pytest.approx(scaled) and most == bound


def test_a_front_holds_the_budgets_that_were_asked_for() -> None:
    groups = [group((8, 1), (4, 2), (2, 4), (1, 8))]
    assert [(one.cost, one.sensitivity) for one in allocation_front(groups, 2)] == [(1, 8), (8, 1)]
    assert [one.cost for one in allocation_front(groups, 2, [2.5, 0.5, 4])] == [1, 2, 4, 8]
    assert [one.cost for one in allocation_front([group((1, 3))], 5)] == [3]


def test_scipy_is_named_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers that need no solver are given all the same."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    groups = [group((2, 1), (1, 2)), group((3, 1), (1, 2))]
    assert best_allocation(groups, 4).sensitivity == 2 and best_allocation(groups, 2).sensitivity == 5
    with pytest.raises(DependencyError, match=r"allocation under a budget needs scipy.*microscale\[allocate\]"):
        best_allocation(groups, 3)
