"""From the words of a caller to a recipe: one of a file, one made of the words, or one that is yet to be found.

``auto`` is a word in the place of a method: ``auto`` rounds to nearest, ``auto+gptq`` by another method. It allocates
formats under a budget of bits, and then quantizes by the recipe that was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from microscale.algorithms.pipeline import parse_method, read_method, with_budget
from microscale.algorithms.registry import AUTO, BEST, PLAIN
from microscale.errors import AllocationError, RecipeError
from microscale.formats import WrittenInputs, WrittenWeights, parse_inputs
from microscale.integrations.attention import attention_modules
from microscale.jobs.allocate import AllocationProblem, FoundRecipe, allocate_model
from microscale.jobs.allocate_options import DEFAULT_CANDIDATES, MeasuringText
from microscale.jobs.option import given_words
from microscale.jobs.quantize_options import RecipeOptions
from microscale.jobs.reporting import Progress
from microscale.jobs.shared_options import CalibrationOptions
from microscale.planning.allocated_layers import parse_fixed
from microscale.planning.budget import Budget, BudgetUnit
from microscale.planning.candidates import Candidate, distinct_candidates, parse_candidates
from microscale.planning.stand_ins import layer_method
from microscale.recipes.fields import parse_rounded
from microscale.recipes.recipe import KV_CACHE, Recipe, load_recipe, make_recipe, parse_rule


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRecipe:
    """A recipe that is yet to be found, and what an allocation does not choose of it (``rounding``: of attention)."""

    problem: AllocationProblem
    layout: str | None = None
    nan: str = "raise"
    rounding: Mapping[str, WrittenWeights]


def choose_recipe(words: RecipeOptions, *, default_layout: str | None = None) -> Recipe | AutoRecipe:
    """Return the recipe that the words stand for, or for method ``auto`` what is to find one.

    ``default_layout`` is that of a recipe without one.

    Raises:
        RecipeError, FormatError, AllocationError: words that cannot be read, or do not go together.
    """
    given = given_words(words) | given_words(words.rounding)
    if words.file is not None or isinstance(words.format, Recipe):
        found = _whole_recipe(words, given)
        return found.model_copy(update={"layout": words.layout or found.layout or default_layout})
    words = replace(words, layout=words.layout or default_layout)
    _check_budget(words.bits)
    method = str(words.method or PLAIN.text)
    if words.effort is not None and BEST not in method.split("+"):
        raise RecipeError(f"--effort {words.effort} chooses a chain of method {BEST}; add --method {BEST}")
    if is_auto(method):
        return _auto_recipe(words)
    if words.format is None:
        parse_method(method)  # an unknown method is the better thing to say
        raise RecipeError("name a format (--format mxfp4) or a recipe (--recipe FILE); see `microscale formats`")
    given.pop("bits", None)
    if words.bits is not None:
        given["method"] = with_budget(read_method(method), words.bits)
    rules = tuple(parse_rule(rule) for rule in words.rules)
    return make_recipe(**{**given, "rules": rules, "layout": words.layout})


def _whole_recipe(words: RecipeOptions, given: dict[str, Any]) -> Recipe:
    """Return a recipe that holds all but the layout, which may be named beside it."""
    source = "recipe" if words.file is not None else "format"
    beside = [word.replace("_", "-") for word in given if word not in (source, "layout")]
    if beside:
        raise RecipeError(f"give either --recipe or --{beside[0]}, not both; write all of it into the recipe")
    found = words.format if words.file is None else load_recipe(words.file)
    assert isinstance(found, Recipe)
    return found


def _check_budget(bits: float | None) -> None:
    if bits is not None and not 0 < bits < math.inf:
        raise RecipeError(f"bits is a number above 0, the mean of stored bits per weight such as 4.5, got {bits!r}")


def is_auto(method: str | None) -> bool:
    """Whether the words of a method stand for an allocation."""
    return method is not None and method.split("+")[0].strip() == AUTO


def _auto_recipe(words: RecipeOptions) -> AutoRecipe:
    """Return what ``auto`` is to find: the formats are its candidates, the rules fix layers by hand.

    The activations (default: none, as everywhere) are for candidates that name none. Refused: no budget, and a part of
    the model that no text reaches.
    """
    part, bits, effort = words.part or "language", words.bits, words.effort or "fast"
    if part != "language":
        raise RecipeError(f"method auto measures layers on text, which does not reach part {part}")
    if bits is None:
        raise AllocationError("method auto needs a budget of bits per weight: --bits 4.5 (bits=4.5 in Python)")
    rounding = str(words.method).partition("+")[2].strip() or PLAIN.text
    parse_method(rounding, effort=effort)
    beside = {side: parse_rounded(word) for side, word in given_words(words.rounding).items()}
    listed = words.format or DEFAULT_CANDIDATES
    candidates = parse_candidates(",".join(listed) if isinstance(listed, list | tuple) else str(listed))
    fixed = [parse_fixed(rule) for rule in words.rules]
    asked = None if words.activations is None else parse_inputs(words.activations)
    inputs = None if asked is None or asked.record is None else asked
    candidates = distinct_candidates(_with_inputs(candidate, inputs) for candidate in candidates)
    fixed = [(where, one if where == KV_CACHE else _with_inputs(one, inputs)) for where, one in fixed]
    problem = AllocationProblem(
        budget=Budget(amount=bits, unit=BudgetUnit.BITS),
        candidates=candidates,
        fixed=tuple(fixed),
        include=tuple(words.include),
        exclude=tuple(words.exclude),
        method=rounding,
        effort=effort,
    )
    return AutoRecipe(problem=problem, layout=words.layout, nan=words.nan or "raise", rounding=beside)


def _with_inputs(candidate: Candidate, inputs: WrittenInputs | None) -> Candidate:
    if candidate.is_kept or candidate.names_inputs:
        return candidate
    return replace(candidate, activations=inputs)


def find_recipe(
    model: Any, auto: AutoRecipe, text: CalibrationOptions, *, tokenizer: Any, progress: Progress
) -> tuple[FoundRecipe, CalibrationOptions]:
    """Allocate for a job that quantizes, on little of its text; returns what is left to calibrate on, too.

    That is nothing where the recipe that was found uses no text.

    Raises:
        MicroscaleError: see :func:`microscale.jobs.allocate.allocate_model`.
    """
    if auto.rounding:
        attention_modules(model)
    least = MeasuringText()
    sparing = replace(text, samples=min(text.samples, least.samples), window=min(text.window, least.window))
    found = allocate_model(model, auto.problem, sparing, tokenizer=tokenizer, progress=progress)
    chosen = {candidate for candidate in found.solution.chosen.values() if not candidate.is_kept}
    chains = [layer_method(candidate, auto.problem.method, auto.problem.effort) for candidate in chosen]
    is_used = any(chain.needs_calibration for chain in chains)
    beside = {"layout": auto.layout, "nan": auto.nan, **auto.rounding}
    found = replace(found, recipe=found.recipe.model_copy(update=beside))
    return found, text if is_used else replace(text, source=None)
