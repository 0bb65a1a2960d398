"""From a model, a budget and a text to a recipe: what ``microscale allocate`` and the preset ``auto`` share.

``auto`` is a word in the place of a method: ``auto`` rounds to nearest, ``auto+gptq`` by another method. It allocates
formats under a budget of bits, and then quantizes by the recipe that was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from microscale.algorithms import AUTO, PLAIN, parse_method
from microscale.errors import AllocationError, CalibrationError, RecipeError, TextError
from microscale.families import describe
from microscale.formats import WrittenInputs, WrittenWeights, parse_inputs
from microscale.integrations.attention import attention_modules
from microscale.integrations.calibration import CalibrationOptions, read_windows
from microscale.nn import unstack_experts
from microscale.planning import (
    DEFAULT_FORMATS,
    AllocatedLayer,
    Budget,
    BudgetUnit,
    Candidate,
    LayerTable,
    MeasuringCost,
    Sensitivity,
    Solution,
    allocated_layers,
    allocation_recipe,
    check_budget,
    check_candidates,
    check_reachable,
    is_tied,
    layer_method,
    measure_table,
    measuring_cost,
    needs_text,
    parse_candidates,
    parse_fixed,
    solve,
)
from microscale.recipes import Calibration, Recipe, Rule
from microscale.recipes.fields import parse_rounded
from microscale.recipes.recipe import KV_CACHE

ALLOCATION_SAMPLES, ALLOCATION_WINDOW = 8, 512
"""What sensitivity is measured on: little text tells layers apart."""
METHOD_WINDOWS = 64
"""Windows that a method learns from, at least, while its layers are measured."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationOptions:
    """What is allocated, and how it is measured; see ``microscale allocate``."""

    budget: Budget
    candidates: tuple[Candidate, ...]
    fixed: tuple[tuple[str, Candidate], ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    method: str = "rtn"
    effort: str = "fast"
    sensitivity: Sensitivity = Sensitivity.FISHER
    is_fused: bool = False
    latency_tokens: int = 1
    points: int = 25


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoundAllocation:
    """The recipe, what it was chosen from, and the calibration of a job that quantizes by it."""

    recipe: Recipe
    calibration: CalibrationOptions
    solution: Solution
    table: LayerTable
    budget: Budget
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRecipe:
    """A recipe that is yet to be found, and what an allocation does not choose of it."""

    options: AllocationOptions
    layout: str | None = None
    nan: str = "raise"
    attention: WrittenWeights | None = None
    kv_cache: WrittenWeights | None = None


def is_auto(method: str | None) -> bool:
    """Whether the words of a method stand for an allocation."""
    return method is not None and method.split("+")[0].strip() == AUTO


def make_auto_recipe(
    *,
    method: str,
    bits: float | None,
    formats: str | None = None,
    activations: str | None = None,
    effort: str = "fast",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[str] = (),
    layout: str | None = None,
    nan: str = "raise",
    part: str = "language",
    attention: str | None = None,
    kv_cache: str | None = None,
) -> AutoRecipe:
    """Return what ``auto`` is to find: ``formats`` are the candidates, ``rules`` fix layers by hand.

    ``activations`` is for candidates that name none.

    Raises:
        AllocationError, RecipeError, FormatError: words that cannot be read, no budget, or a part of the model that no
            text reaches.
    """
    if part != "language":
        raise RecipeError(f"method auto measures layers on text, which does not reach part {part}")
    if bits is None:
        raise AllocationError("method auto needs a budget of bits per weight: --bits 4.5 (bits=4.5 in Python)")
    rounding = method.partition("+")[2].strip() or PLAIN.text
    parse_method(rounding, effort=effort)
    rounded = {"attention": attention, "kv_cache": kv_cache}
    beside = {key: None if word is None else parse_rounded(word) for key, word in rounded.items()}
    candidates = parse_candidates(formats or DEFAULT_FORMATS)
    fixed = [parse_fixed(rule) for rule in rules]
    if activations is not None:
        asked = parse_inputs(activations)
        inputs = None if asked.record is None else asked
        candidates = tuple(_with_inputs(candidate, inputs) for candidate in candidates)
        fixed = [(where, one if where == KV_CACHE else _with_inputs(one, inputs)) for where, one in fixed]
    options = AllocationOptions(
        budget=Budget(amount=bits, unit=BudgetUnit.BITS),
        candidates=candidates,
        fixed=tuple(fixed),
        include=tuple(include),
        exclude=tuple(exclude),
        method=rounding,
        effort=effort,
    )
    return AutoRecipe(options=options, layout=layout, nan=nan, **beside)


def _with_inputs(candidate: Candidate, inputs: WrittenInputs | None) -> Candidate:
    if candidate.is_kept or candidate.names_inputs:
        return candidate
    return replace(candidate, activations=inputs)


def allocate_model(
    model: Any,
    options: AllocationOptions,
    text: CalibrationOptions,
    *,
    tokenizer: Any,
    progress: Progress,
    tell: Callable[[str], None] = lambda note: None,
) -> FoundAllocation:
    """Measure a transformers model and find the optimum under a budget; the model stays as it is.

    Stacked experts are taken apart. ``tell`` gets what measuring will take, before it begins.

    Raises:
        CalibrationError: no text.
        AllocationError: a budget or candidates that do not serve, before anything is measured where that can be known.
        ModelError, RecipeError, TextError: see the rooms that are called.
    """
    if text.source is None:
        raise CalibrationError("allocation measures layers on text: give --calibration FILE (calibration=… in Python)")
    layers, every = _checked_layers(model, options)
    by_hand = {"method": options.method, "effort": options.effort}
    given = _windows(text, tokenizer, model, text.samples)
    taught = _method_windows(text, tokenizer, model) if needs_text(every, **by_hand) else None
    tokens = given.windows.numel()
    cost = measuring_cost(options.sensitivity, len(layers), len(every), len(describe(model).blocks), tokens)
    notes = _notes(cost, options, len(layers), every)
    tell(notes[0])
    table = measure_table(
        model,
        layers,
        every,
        calibration=given,
        method_text=taught,
        sensitivity=options.sensitivity,
        latency_tokens=options.latency_tokens if options.budget.unit is BudgetUnit.MILLISECONDS else None,
        progress=progress,
        check=lambda found: check_reachable(found, options.budget),
        **by_hand,
    )
    solution = solve(table, options.budget, points=options.points)
    recipe = allocation_recipe(model, table, solution.chosen, **by_hand)
    cache = _cache_formats(options)
    if cache:
        recipe = recipe.model_copy(update={"rules": (*recipe.rules, Rule(match=KV_CACHE, weights=cache[-1]))})
    return FoundAllocation(
        recipe=recipe,
        calibration=text,
        solution=solution,
        table=table,
        budget=options.budget,
        notes=tuple(notes),
    )


def _checked_layers(model: Any, options: AllocationOptions) -> tuple[tuple[AllocatedLayer, ...], tuple[Candidate, ...]]:
    """Return the layers and all candidates; what cannot be allocated is refused before any text is read."""
    parse_method(options.method, effort=options.effort)
    if any(written.record is not None for written in _cache_formats(options)):
        attention_modules(model)
    unstack_experts(model)
    layers, every = allocated_layers(
        model,
        options.candidates,
        fixed=options.fixed,
        include=options.include,
        exclude=options.exclude,
        is_fused=options.is_fused,
    )
    check_budget(model, layers, every, options.budget)
    names = [layer.name for layer in layers]
    check_candidates(model, names, every, method=options.method, effort=options.effort)
    return layers, every


def _cache_formats(options: AllocationOptions) -> list[WrittenWeights]:
    """Return what was said of the KV cache; the last one counts."""
    return [candidate.weights for pattern, candidate in options.fixed if pattern == KV_CACHE]


def _windows(text: CalibrationOptions, tokenizer: Any, model: Any, samples: int) -> Calibration:
    assert text.source is not None
    found = read_windows(
        text.source,
        tokenizer,
        model,
        samples=samples,
        window=text.window,
        seed=text.seed,
        field=text.field,
        feed="original",
    )
    if isinstance(text.source, Tensor):
        return replace(found, windows=found.windows[:samples])
    return found


def _method_windows(text: CalibrationOptions, tokenizer: Any, model: Any) -> Calibration:
    """Return windows for the method: more than sensitivity needs, or as many where the text is short."""
    try:
        return _windows(text, tokenizer, model, max(text.samples, METHOD_WINDOWS))
    except TextError:
        return _windows(text, tokenizer, model, text.samples)


def _notes(cost: MeasuringCost, options: AllocationOptions, layers: int, candidates: Sequence[Candidate]) -> list[str]:
    """Return what measuring takes, and what it cannot see."""
    notes = [
        f"sensitivity {options.sensitivity.value}: {layers} layers in {len(candidates)} candidates, the work of about"
        f" {cost.passes:.0f} passes over {cost.tokens} tokens"
    ]
    chains = [layer_method(c, options.method, options.effort) for c in candidates if not c.is_kept]
    if any(is_tied(chain) for chain in chains):
        notes.append(f"method {options.method} ties layers together: sensitivity is that of plain rounding")
    return notes


def find_recipe(
    model: Any, auto: AutoRecipe, text: CalibrationOptions, *, tokenizer: Any, progress: Progress
) -> FoundAllocation:
    """Allocate for a job that quantizes, on little of its text; it gets no text at all where the recipe uses none.

    Raises:
        MicroscaleError: see :func:`allocate_model`.
    """
    if auto.attention is not None or auto.kv_cache is not None:
        attention_modules(model)
    samples, window = min(text.samples, ALLOCATION_SAMPLES), min(text.window, ALLOCATION_WINDOW)
    sparing = replace(text, samples=samples, window=window)
    found = allocate_model(model, auto.options, sparing, tokenizer=tokenizer, progress=progress)
    chosen = {candidate for candidate in found.solution.chosen.values() if not candidate.is_kept}
    chains = [layer_method(candidate, auto.options.method, auto.options.effort) for candidate in chosen]
    is_used = any(chain.needs_calibration for chain in chains)
    beside = {"layout": auto.layout, "nan": auto.nan, "attention": auto.attention, "kv_cache": auto.kv_cache}
    return replace(
        found,
        recipe=found.recipe.model_copy(update=beside),
        calibration=text if is_used else replace(text, source=None),
    )
