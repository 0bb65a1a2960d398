"""From a model, candidates and a budget to a recipe: measure, solve, write down.

Which layers: every linear layer that a plan would quantize, those fixed by hand included. A fixed layer has one
candidate, and counts for the budget like the others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from microscale.errors import AllocationError
from microscale.families import describe
from microscale.nn import PackedModule, QuantizedLinear
from microscale.planning.allocation import (
    Allocation,
    Choice,
    ChoiceGroup,
    allocate,
    front,
    largest_cost,
    least_cost,
)
from microscale.planning.budget import Budget, BudgetUnit, amount_text
from microscale.planning.candidates import Candidate, parse_candidate
from microscale.planning.latency import measure_latencies
from microscale.planning.sensitivity import Sensitivity, measure_sensitivity
from microscale.planning.stand_ins import make_stand_ins, measured_method
from microscale.recipes import Calibration, Recipe, make_plan, make_recipe, matches, quantizable_modules
from microscale.recipes.blocks import float32_model
from microscale.recipes.recipe import NONE

ROLES = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down", "embedding", "norm", "lm_head", "kv_cache")
BITS_GRAIN = 0.0005
"""Bits per weight are met to three decimals: a scale for a whole tensor must not cost a layer its format."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatedLayer:
    """A layer with its role, the names it is fused with, and the candidates it may get (by index)."""

    name: str
    role: str
    kind: str
    shape: tuple[int, int]
    fused: tuple[str, ...]
    candidates: tuple[int, ...]

    @property
    def num_weights(self) -> int:
        """Weights of the layer."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """All that a budget is solved from: layers and, for each candidate, sensitivity, bytes and milliseconds."""

    layers: tuple[AllocatedLayer, ...]
    candidates: tuple[Candidate, ...]
    sensitivity: Mapping[str, Sequence[float]]
    num_bytes: Mapping[str, Sequence[int]]
    milliseconds: Mapping[str, Sequence[float]] | None
    other_bytes: int
    """Bytes of the model besides these layers' weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """One optimum: cost in the budget's unit, bits per weight, summed sensitivity, layers by candidate."""

    cost: float
    bits_per_weight: float
    sensitivity: float
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The optimum under the budget by layer, its sums, and the front around it."""

    chosen: Mapping[str, Candidate]
    point: FrontPoint
    front: tuple[FrontPoint, ...]
    uniform: Mapping[str, FrontPoint]
    """Every candidate given to all layers that may have it."""


def parse_fixed(text: str) -> tuple[str, Candidate]:
    """Parse ``ROLE_OR_GLOB=WEIGHTS[/ACTIVATIONS]``.

    Raises:
        AllocationError: no ``=``, no formats, or a role whose numbers are never rounded.
    """
    pattern, equals, right = text.partition("=")
    if not (pattern and equals and right):
        raise AllocationError(f"--fix {text!r} must read ROLE=FORMAT or GLOB=FORMAT, e.g. mlp.down=mxfp8")
    candidate = parse_candidate(right)
    if pattern in ("norm", "kv_cache") and not candidate.is_kept:
        what = "norms are" if pattern == "norm" else "the key-value cache is"
        raise AllocationError(f"--fix {text}: {what} not stored in a block format by a recipe; only {pattern}={NONE}")
    return pattern, candidate


def allocated_layers(
    model: Any,
    candidates: Sequence[Candidate],
    *,
    fixed: Sequence[tuple[str, Candidate]] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    is_fused: bool = False,
) -> tuple[tuple[AllocatedLayer, ...], tuple[Candidate, ...]]:
    """Return the layers that a budget is spread over, and all candidates, those fixed by hand at the end.

    Raises:
        AllocationError: a fixed role or pattern that no layer has.
        ModelError, RecipeError: as :func:`microscale.recipes.make_plan`.
    """
    every = list(candidates)
    for _, candidate in fixed:
        if candidate not in every:
            every.append(candidate)
    modules = quantizable_modules(model)
    roles, groups = _roles(model, modules)
    wanted = [name for name in modules if any(_is_meant(pattern, name, roles) for pattern, _ in fixed)]
    for pattern, _ in fixed:
        if pattern not in ("norm", "kv_cache") and not any(_is_meant(pattern, name, roles) for name in modules):
            present = ", ".join(sorted(set(roles.values())))
            raise AllocationError(f"--fix {pattern!r} is no role and matches no layer; roles of this model: {present}")
    included = [name for name in modules if any(matches(p, name) or roles[name] == p for p in include)]
    base = next(c for c in every if not c.is_kept) if any(not c.is_kept for c in every) else None
    if base is None:
        raise AllocationError("all candidates leave layers alone; name a format to allocate")
    recipe = make_recipe(
        format=base.weights, include=tuple(dict.fromkeys([*included, *wanted])), exclude=tuple(exclude)
    )
    found: list[AllocatedLayer] = []
    for layer in make_plan(model, recipe).layers:
        own = [every.index(candidate) for pattern, candidate in fixed if _is_meant(pattern, layer.name, roles)]
        fused = tuple(groups.get(layer.name, (layer.name,))) if is_fused else (layer.name,)
        found.append(
            AllocatedLayer(
                name=layer.name,
                role=roles[layer.name],
                kind=layer.kind,
                shape=layer.shape,
                fused=fused,
                candidates=(own[-1],) if own else tuple(range(len(candidates))),
            )
        )
    return tuple(found), tuple(every)


def _is_meant(pattern: str, name: str, roles: Mapping[str, str]) -> bool:
    return roles[name] == pattern or (pattern not in ROLES and matches(pattern, name))


def _roles(model: Any, modules: Mapping[str, tuple[str, nn.Module]]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the role of every layer, and the layers that share an input with it, its kind of work included."""
    structure = describe(model)
    roles: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for block in structure.blocks:
        for group in block.groups:
            names = [f"{block.name}.{linear}" for linear in group.linears]
            for name in names:
                roles[name], groups[name] = group.role, names
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, (kind, module) in modules.items():
        if name not in roles:
            roles[name] = "embedding" if kind == "embedding" else "lm_head" if module is head else "other"
    return roles, groups


def measure_table(
    model: Any,
    layers: Sequence[AllocatedLayer],
    candidates: Sequence[Candidate],
    *,
    calibration: Calibration,
    method_text: Calibration | None,
    sensitivity: Sensitivity,
    method: str,
    effort: str,
    latency_tokens: int | None,
    progress: Progress,
) -> LayerTable:
    """Measure every layer in every candidate; the model stays as it is.

    ``calibration`` is what sensitivity is measured on, ``method_text`` what the method learns from.
    """
    names = [layer.name for layer in layers]
    chain = measured_method(method, effort)
    stand_ins = make_stand_ins(model, names, candidates, method=chain, calibration=method_text, progress=progress)
    blocks = [block.name for block in describe(model).blocks]
    originals = {name: model.get_submodule(name) for name in names}
    num_bytes = {name: [_bytes_of(s, originals[name]) for s in stand_ins[name]] for name in names}
    rest = other_bytes(model, layers)
    with float32_model(model):
        found = measure_sensitivity(
            model, stand_ins, blocks, calibration.windows, sensitivity, seed=calibration.seed, progress=progress
        )
        times = None
        if latency_tokens is not None:
            times = measure_latencies(stand_ins, originals, tokens=latency_tokens, progress=progress)
    return LayerTable(
        layers=tuple(layers),
        candidates=tuple(candidates),
        sensitivity=found,
        num_bytes=num_bytes,
        milliseconds=times,
        other_bytes=rest,
    )


def _bytes_of(stand_in: nn.Module | None, original: nn.Module) -> int:
    if stand_in is None:
        weight = original.get_parameter("weight")
        return weight.numel() * weight.element_size()
    if isinstance(stand_in, QuantizedLinear):
        return stand_in.num_bytes
    assert isinstance(stand_in, PackedModule)
    return stand_in.tensor.num_bytes


def other_bytes(model: nn.Module, layers: Sequence[AllocatedLayer]) -> int:
    """Return the bytes of a model besides the weights of these layers."""
    own = {id(model.get_submodule(layer.name).get_parameter("weight")) for layer in layers}
    tensors = {id(p): p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers())}
    return sum(size for key, size in tensors.items() if key not in own)


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
    smallest = bits / weights if is_bits else math.floor(bits / 8) + other_bytes(model, layers)
    _refuse_small(budget, smallest, None)


def _refuse_small(budget: Budget, smallest: float, dearest: float | None) -> None:
    grain = BITS_GRAIN if budget.unit is BudgetUnit.BITS else 0.0
    if budget.amount + grain >= smallest:
        return
    useful = "" if dearest is None else f" (up to {amount_text(dearest, budget.unit)} is of use)"
    raise AllocationError(
        f"budget {budget.text} is below the smallest possible with these formats,"
        f" {amount_text(smallest, budget.unit)}; raise it{useful} or allow a smaller format"
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
    weights = sum(layer.num_weights for layer in table.layers)
    scale, constant = 1.0, 0.0
    limit = budget.amount
    if budget.unit is BudgetUnit.BITS:
        scale, limit = float(weights), budget.amount + BITS_GRAIN
    elif budget.unit is BudgetUnit.BYTES:
        constant = float(table.other_bytes)
    _refuse_small(budget, (least_cost(groups) + constant) / scale, (largest_cost(groups) + constant) / scale)

    def point(allocation: Allocation) -> FrontPoint:
        return _point(table, groups, allocation, (allocation.cost + constant) / scale)

    best = allocate(groups, limit * scale - constant)
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
    return Solution(
        chosen=chosen,
        point=point(best),
        front=tuple(point(one) for one in front(groups, points, budgets)),
        uniform=uniform,
    )


def _point(table: LayerTable, groups: Sequence[ChoiceGroup], allocation: Allocation, cost: float) -> FrontPoint:
    counts: Counter[str] = Counter()
    num_bytes = 0
    for group, choice in zip(groups, allocation.chosen, strict=True):
        counts[table.candidates[choice.candidate].text] += len(group.names)
        num_bytes += sum(table.num_bytes[name][choice.candidate] for name in group.names)
    weights = sum(layer.num_weights for layer in table.layers)
    return FrontPoint(
        cost=cost, bits_per_weight=8 * num_bytes / weights, sensitivity=allocation.sensitivity, counts=dict(counts)
    )


def allocation_recipe(
    model: Any, layers: Sequence[AllocatedLayer], chosen: Mapping[str, Candidate], *, method: str, effort: str
) -> Recipe:
    """Return the recipe that gives every layer what was chosen: the commonest as the base, a rule for each other."""
    counts = Counter(candidate for candidate in chosen.values() if not candidate.is_kept)
    if not counts:
        raise AllocationError("under this budget every layer stays as it is; there is nothing to quantize")
    base = counts.most_common(1)[0][0]
    modules = quantizable_modules(model)
    plan = make_plan(model, make_recipe(format=base.weights))
    by_default = {layer.name for layer in plan.layers}
    rules = [
        {
            "match": name,
            "weights": candidate.weights,
            "activations": None if candidate.is_kept else candidate.activations or NONE,
        }
        for name, candidate in chosen.items()
        if candidate != base
    ]
    return make_recipe(
        format=base.weights,
        activations=base.activations or NONE,
        method=method,
        effort=effort,
        include=tuple(layer.name for layer in layers if layer.name not in by_default),
        exclude=tuple(name for name in modules if name in by_default and name not in chosen),
        rules=tuple(rules),
    )
