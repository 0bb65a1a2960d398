"""From measured layers and a budget to a recipe: solve, write down.

A layer that is fixed by hand has one candidate, and counts for the budget like the others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from microscale.errors import AllocationError
from microscale.evaluation.perplexity import perplexity_of_mean
from microscale.formats import NONE
from microscale.nn.sizes import Size, held_size
from microscale.planning.allocated_layers import AllocatedLayer
from microscale.planning.allocation import (
    Allocation,
    Choice,
    ChoiceGroup,
    allocation_front,
    best_allocation,
    largest_cost,
    least_cost,
)
from microscale.planning.budget import Budget, BudgetUnit, amount_text
from microscale.planning.candidates import Candidate
from microscale.planning.layer_table import LayerTable
from microscale.recipes.plan import make_plan, quantizable_modules
from microscale.recipes.recipe import Recipe, make_recipe

DISTINCT_SHARE = 0.01
"""Points of a front differ by this share of their sensitivity, or one of them says nothing new."""
BITS_GRAIN = 0.0005
"""Bits per weight are met to three decimals: a scale for a whole tensor must not cost a layer its format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """One optimum: cost in the budget's unit, bits per allocated weight, summed sensitivity, layers by candidate.

    ``whole`` is the model with all that is not allocated. ``perplexity``: what is predicted on the text of the
    measuring, that of the unquantized model times exp(sensitivity); None where sensitivities are no nats.
    """

    cost: float
    bits_per_weight: float
    whole: Size
    sensitivity: float
    perplexity: float | None
    counts: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """Return the sums, and the layers of each candidate."""
        return {
            "cost": self.cost,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.whole.num_bytes,
            "bits_per_weight_model": self.whole.bits_per_weight,
            "sensitivity": self.sensitivity,
            "predicted_perplexity": self.perplexity,
            "layers": dict(self.counts),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The optimum under the budget by layer, its sums, and the front around it."""

    chosen: Mapping[str, Candidate]
    point: FrontPoint
    front: tuple[FrontPoint, ...]
    uniform: Mapping[str, FrontPoint]
    """Every candidate given to all layers that may have it."""


def check_budget(
    model: nn.Module, layers: Sequence[AllocatedLayer], candidates: Sequence[Candidate], budget: Budget
) -> None:
    """Refuse a budget of bits or bytes that the formats alone exceed, before anything is measured.

    Raises:
        AllocationError: with the smallest possible.
    """
    if budget.unit is BudgetUnit.MILLISECONDS:
        return
    bits, weights = 0.0, 0
    for layer in layers:
        kept = 8.0 * model.get_submodule(layer.name).get_parameter("weight").element_size()
        own = [candidates[place].bits_per_weight(layer.shape, kept) for place in layer.candidates]
        bits += min(own) * layer.num_weights
        weights += layer.num_weights
    is_bits = budget.unit is BudgetUnit.BITS
    smallest = (
        bits / weights
        if is_bits
        else math.floor(bits / 8) + held_size(model, without=(layer.name for layer in layers)).num_bytes
    )
    _refuse_small(budget, smallest, None)


def check_reachable(table: LayerTable, budget: Budget) -> None:
    """Refuse a budget that no choice meets, by what bytes and times were measured; sensitivities play no part.

    Raises:
        AllocationError: with the smallest possible.
    """
    groups = choice_groups(table, budget.unit)
    scale, constant = _scale(table, budget.unit)
    dearest = sum(max(choice.cost for choice in group.choices) for group in groups)
    _refuse_small(budget, (least_cost(groups) + constant) / scale, (dearest + constant) / scale)


def _scale(table: LayerTable, unit: BudgetUnit) -> tuple[float, float]:
    """Return (scale, constant) with budget amount = (summed cost + constant) / scale."""
    if unit is BudgetUnit.BITS:
        return float(sum(layer.num_weights for layer in table.layers)), 0.0
    return 1.0, float(table.others.num_bytes) if unit is BudgetUnit.BYTES else 0.0


def _refuse_small(budget: Budget, smallest: float, dearest: float | None) -> None:
    grain = BITS_GRAIN if budget.unit is BudgetUnit.BITS else 0.0
    if budget.amount + grain >= smallest:
        return
    useful = "" if dearest is None else f" (up to {amount_text(dearest, budget.unit)} is of use)"
    raise AllocationError(
        f"budget {budget.text} is below the smallest possible with these formats,"
        f" {amount_text(smallest, budget.unit)}; raise it{useful}, allow a smaller format or fix fewer layers by hand"
    )


def choice_groups(table: LayerTable, unit: BudgetUnit) -> list[ChoiceGroup]:
    """Return the groups of layers with what each candidate costs in whole bits, bytes or milliseconds.

    Raises:
        AllocationError: fused layers that were fixed to different formats, or no measured times.
    """
    by_name = {layer.name: layer for layer in table.layers}
    found: list[ChoiceGroup] = []
    done: set[str] = set()
    for layer in table.layers:
        if layer.name in done:
            continue
        names = tuple(name for name in layer.fused if name in by_name)
        done.update(names)
        possible = [c for c in layer.candidates if all(c in by_name[name].candidates for name in names)]
        if not possible:
            raise AllocationError(f"{', '.join(names)} run as one layer, but are fixed to different formats")
        choices = [
            Choice(
                candidate=c,
                sensitivity=math.fsum(table.sensitivity[name][c] for name in names),
                cost=math.fsum(_cost(table, name, c, unit) for name in names),
            )
            for c in possible
        ]
        found.append(ChoiceGroup(names=names, choices=tuple(choices)))
    return found


def _cost(table: LayerTable, name: str, candidate: int, unit: BudgetUnit) -> float:
    if unit is BudgetUnit.MILLISECONDS:
        if table.milliseconds is None:
            raise AllocationError("a budget in milliseconds needs measured times")
        return table.milliseconds[name][candidate]
    return float(table.num_bytes[name][candidate] * (8 if unit is BudgetUnit.BITS else 1))


def solve(table: LayerTable, budget: Budget, *, points: int = 25) -> Solution:
    """Return the optimum within the budget, and the optima of other budgets around it.

    Raises:
        AllocationError: a budget below the smallest possible, which the message names.
    """
    groups = choice_groups(table, budget.unit)
    scale, constant = _scale(table, budget.unit)
    limit = budget.amount + (BITS_GRAIN if budget.unit is BudgetUnit.BITS else 0.0)
    _refuse_small(budget, (least_cost(groups) + constant) / scale, (largest_cost(groups) + constant) / scale)

    def point(allocation: Allocation) -> FrontPoint:
        return _point(table, groups, allocation, (allocation.cost + constant) / scale)

    best = best_allocation(groups, limit * scale - constant)
    uniform: dict[str, FrontPoint] = {}
    budgets = [best.cost]
    for index, candidate in enumerate(table.candidates):
        picks = [next((c for c in group.choices if c.candidate == index), None) for group in groups]
        if all(pick is not None or len(group.choices) == 1 for pick, group in zip(picks, groups, strict=True)):
            chosen = tuple(pick or group.choices[0] for pick, group in zip(picks, groups, strict=True))
            same = Allocation(chosen=chosen)
            uniform[candidate.text] = point(same)
            budgets.append(same.cost)
    chosen = {
        name: table.candidates[choice.candidate]
        for group, choice in zip(groups, best.chosen, strict=True)
        for name in group.names
    }
    found = point(best)
    return Solution(
        chosen=chosen,
        point=found,
        front=distinct_points([point(one) for one in allocation_front(groups, points, budgets)], found),
        uniform=uniform,
    )


def distinct_points(points: Sequence[FrontPoint], best: FrontPoint) -> tuple[FrontPoint, ...]:
    """Return the points of a front, the cheapest first, that each lower the sensitivity of the one before by a share.

    Of points closer than that the cheaper one stays, but for the choice itself (``best``), which always does.
    """
    kept: list[FrontPoint] = []
    every = {(one.cost, one.sensitivity): one for one in (*points, best)}
    for one in sorted(every.values(), key=lambda one: (one.cost, one.sensitivity)):
        if kept and one.sensitivity >= (1 - DISTINCT_SHARE) * kept[-1].sensitivity:
            if one is not best:
                continue
            kept.pop()
        kept.append(one)
    return tuple(kept)


def _point(table: LayerTable, groups: Sequence[ChoiceGroup], allocation: Allocation, cost: float) -> FrontPoint:
    counts: Counter[str] = Counter()
    num_bytes = 0
    for group, choice in zip(groups, allocation.chosen, strict=True):
        counts[table.candidates[choice.candidate].text] += len(group.names)
        num_bytes += sum(table.num_bytes[name][choice.candidate] for name in group.names)
    size = Size(num_weights=sum(layer.num_weights for layer in table.layers), num_bytes=num_bytes)
    loss = None if table.perplexity is None else math.log(table.perplexity) + allocation.sensitivity
    return FrontPoint(
        cost=cost,
        bits_per_weight=size.bits_per_weight,
        whole=size + table.others,
        sensitivity=allocation.sensitivity,
        perplexity=None if loss is None else perplexity_of_mean(loss),
        counts=dict(counts),
    )


def allocation_recipe(
    model: Any, table: LayerTable, chosen: Mapping[str, Candidate], *, method: str, effort: str
) -> Recipe:
    """Return the recipe that gives every layer what was chosen: the commonest as the base, a rule for each other."""
    own = {name: table.methods[name][table.candidates.index(candidate)] for name, candidate in chosen.items()}
    counts = Counter(candidate for candidate in chosen.values() if not candidate.is_kept)
    if not counts:
        raise AllocationError("under this budget every layer stays as it is; there is nothing to quantize")
    plain = [candidate for candidate, _ in counts.most_common() if candidate.method is None]
    base = plain[0] if plain else counts.most_common(1)[0][0]
    modules = quantizable_modules(model)
    plan = make_plan(model, make_recipe(format=base.weights))
    by_default = {layer.name for layer in plan.layers}
    rules = [
        {
            "match": name,
            "weights": candidate.weights,
            "activations": None if candidate.is_kept else candidate.activations or NONE,
            "method": own[name],
        }
        for name, candidate in chosen.items()
        if candidate != base or candidate.method is not None
    ]
    return make_recipe(
        format=base.weights,
        activations=base.activations or NONE,
        method=method,
        effort=effort,
        include=tuple(layer.name for layer in table.layers if layer.name not in by_default),
        exclude=tuple(name for name in modules if name in by_default and name not in chosen),
        rules=tuple(rules),
    )
