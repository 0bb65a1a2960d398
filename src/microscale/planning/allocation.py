"""Choose one format for every layer so that the summed sensitivity is least under a budget: exactly, by a solver.

With s(i, c) the sensitivity and k(i, c) the cost of candidate c for group i, both sums over the group's layers:

    minimize  Σ s(i, c) · x(i, c)   subject to   Σ_c x(i, c) = 1 for each i,   Σ k(i, c) · x(i, c) ≤ budget,   x binary.

This is the multiple-choice knapsack problem. It is solved to proven optimality by HiGHS (scipy.optimize.milp).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from microscale.errors import AllocationError, DependencyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One candidate for one group: its index in the list of candidates, sensitivity and cost."""

    candidate: int
    sensitivity: float
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceGroup:
    """Layers that get one candidate together, with what they may get."""

    names: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The choice of each group, in the order of the groups, with the sums."""

    chosen: tuple[Choice, ...]

    @property
    def cost(self) -> float:
        """Summed cost."""
        return math.fsum(choice.cost for choice in self.chosen)

    @property
    def sensitivity(self) -> float:
        """Summed sensitivity."""
        return math.fsum(choice.sensitivity for choice in self.chosen)


def least_cost(groups: Sequence[ChoiceGroup]) -> float:
    """Return the smallest budget that can be met."""
    return math.fsum(min(choice.cost for choice in group.choices) for group in groups)


def largest_cost(groups: Sequence[ChoiceGroup]) -> float:
    """Return what the least sensitive choices cost; no budget beyond it changes the result."""
    best = (min(group.choices, key=lambda choice: (choice.sensitivity, choice.cost)) for group in groups)
    return math.fsum(choice.cost for choice in best)


def best_allocation(groups: Sequence[ChoiceGroup], budget: float) -> Allocation:
    """Return the allocation of least summed sensitivity within the budget; of equal ones not always the cheapest.

    Optimal up to a relative gap of 1e-9 of the worst possible sum.

    Raises:
        AllocationError: a budget below the smallest possible (the message has it), or a sensitivity that is not finite.
        DependencyError: scipy is not installed.
    """
    for group in groups:
        if not all(math.isfinite(choice.sensitivity) for choice in group.choices):
            raise AllocationError(
                f"the sensitivity of {group.names[0]} is not finite: the model overflows with one of the candidates;"
                " leave that format out, or check the model"
            )
    minimum = least_cost(groups)
    if budget < minimum and not math.isclose(budget, minimum, rel_tol=1e-12):
        raise AllocationError(f"the smallest possible cost is {minimum:.6g}, the budget {budget:.6g}")
    limit = max(budget, minimum)
    if len(groups) == 0 or largest_cost(groups) <= limit:
        best = (min(group.choices, key=lambda choice: (choice.sensitivity, choice.cost)) for group in groups)
        return Allocation(chosen=tuple(best))
    if math.isclose(limit, minimum, rel_tol=1e-12):
        cheapest = (min(group.choices, key=lambda choice: (choice.cost, choice.sensitivity)) for group in groups)
        return Allocation(chosen=tuple(cheapest))
    return _solved(groups, limit)


def _solved(groups: Sequence[ChoiceGroup], limit: float) -> Allocation:
    """Solve by HiGHS; what it returns is checked, for it allows small violations."""
    optimize = _scipy_optimize()
    pairs = [(place, choice) for place, group in enumerate(groups) for choice in group.choices]
    costs, bound = _scaled_costs([choice.cost for _, choice in pairs], limit)
    # HiGHS stops at an absolute gap of 1e-6, so the objective is stretched; a constant for each group changes nothing.
    floors = [min(choice.sensitivity for choice in group.choices) for group in groups]
    gains = np.array([choice.sensitivity - floors[place] for place, choice in pairs])
    gains = gains * (1e6 / max(float(gains.max()), 1e-300))
    one_each = np.zeros((len(groups), len(pairs)))
    for column, (place, _) in enumerate(pairs):
        one_each[place, column] = 1.0
    constraints = [optimize.LinearConstraint(one_each, 1, 1), optimize.LinearConstraint(costs[None, :], -np.inf, bound)]
    with _quiet_output():
        found = optimize.milp(
            gains,
            integrality=np.ones(len(pairs)),
            bounds=optimize.Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 1e-9},
        )
    if found.x is None:
        raise AllocationError(f"the solver found no allocation: {found.message}")
    chosen: list[Choice] = []
    for place in range(len(groups)):
        own = [column for column, (owner, _) in enumerate(pairs) if owner == place]
        chosen.append(pairs[max(own, key=lambda column: found.x[column])][1])
    result = Allocation(chosen=tuple(chosen))
    assert result.cost <= limit * (1 + 1e-9), "the solver broke the budget"
    return result


@contextlib.contextmanager
def _quiet_output() -> Generator[None, None, None]:
    """Throw away what C code prints inside the block: HiGHS leaves remarks on standard output, whatever its options.

    They would break the JSON that a command prints there. Where there is no standard output nothing happens.
    """
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    _flush_c_output()
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
        _flush_c_output()
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _flush_c_output() -> None:
    """Empty the buffers of C, so that what was printed goes where standard output is at this moment."""
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


def _scaled_costs(costs: Sequence[float], limit: float) -> tuple[np.ndarray[Any, Any], float]:
    """Return costs and budget in units in which the solver's tolerance of 1e-6 cannot hide a violation.

    Whole numbers are divided by their greatest common divisor, and half a unit of room is added; others are scaled to a
    budget of a million.
    """
    if all(float(cost).is_integer() and cost < 2**52 for cost in costs):
        unit = math.gcd(*(int(cost) for cost in costs)) or 1
        whole = math.floor(limit / unit + 1e-9)
        if whole < 1e9:
            return np.array([int(cost) // unit for cost in costs], dtype=np.float64), whole + 0.5
    stretch = 1e6 / limit
    return np.array(costs, dtype=np.float64) * stretch, 1e6


def allocation_front(groups: Sequence[ChoiceGroup], points: int, budgets: Sequence[float] = ()) -> list[Allocation]:
    """Return optimal allocations for evenly spaced budgets from the smallest to the largest useful one, none twice.

    ``budgets`` are tried too, as far as they can be met.
    """
    low, high = least_cost(groups), max(largest_cost(groups), least_cost(groups))
    spaced = [low + (high - low) * step / max(points - 1, 1) for step in range(points)]
    found: list[Allocation] = []
    for budget in sorted({*spaced, *(budget for budget in budgets if low <= budget)}):
        one = best_allocation(groups, budget)
        if not found or one.sensitivity < found[-1].sensitivity:
            found.append(one)
    return found


def check_solver() -> None:
    """Refuse to begin without the solver.

    Raises:
        DependencyError: scipy is not installed.
    """
    _scipy_optimize()


def _scipy_optimize() -> Any:
    try:
        from scipy import optimize
    except ImportError:
        raise DependencyError("scipy", extra="allocate", purpose="allocation under a budget") from None
    return optimize
