"""Measure how much each layer suffers in each format, and find the best formats under a budget, as a recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from microscale.algorithms.pipeline import parse_method
from microscale.checkpoint.writer import check_text_target, write_text_file
from microscale.errors import AllocationError, CalibrationError, TextError, counted
from microscale.families.look_up import describe
from microscale.formats import WrittenWeights
from microscale.integrations.attention import attention_modules
from microscale.integrations.originals import Original
from microscale.jobs.allocate_options import AllocateOptions
from microscale.jobs.calibration import checked_source, read_windows
from microscale.jobs.reporting import SILENT, Progress, Reporter
from microscale.jobs.shared_options import TextOptions
from microscale.layerwise.devices import chosen_device, on_device
from microscale.nn.experts import unstack_experts
from microscale.planning.allocated_layers import AllocatedLayer, Grouping, allocated_layers, parse_fixed
from microscale.planning.allocation import check_solver
from microscale.planning.allocator import Solution, allocation_recipe, check_budget, check_reachable, solve
from microscale.planning.budget import Budget, BudgetUnit, amount_text, parse_budget
from microscale.planning.candidates import Candidate, parse_candidates
from microscale.planning.layer_table import LayerTable, measure_table
from microscale.planning.sensitivity import MeasuringCost, Sensitivity, measuring_cost, parse_sensitivity
from microscale.planning.stand_ins import check_candidates, is_tied, layer_method, needs_text
from microscale.recipes.calibration import Calibration
from microscale.recipes.recipe import KV_CACHE, Recipe, RecipeRule
from microscale.recipes.writing import recipe_text
from microscale.report.allocation import allocation_plot, check_picture

METHOD_WINDOWS = 64
"""Windows that a method learns from, at least, while its layers are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationProblem:
    """What is allocated, and how it is measured: the words of the options, parsed."""

    budget: Budget
    candidates: tuple[Candidate, ...]
    fixed: tuple[tuple[str, Candidate], ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    method: str = "rtn"
    effort: str = "fast"
    sensitivity: Sensitivity = Sensitivity.FISHER
    grouping: Grouping = Grouping.SINGLE
    latency_tokens: int = 1
    points: int = 25


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoundRecipe:
    """The recipe and what it was chosen from; ``work`` says what measuring took, ``notes`` what it could not see."""

    recipe: Recipe
    solution: Solution
    table: LayerTable
    budget: Budget
    sensitivity: Sensitivity
    work: str
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return what a job that quantizes says of it."""
        return {
            "budget": self.budget.amount,
            "result": self.solution.point,
            "front": self.solution.front,
            "recipe": recipe_text(self.recipe),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AllocateResult:
    """What was found, where it was written (None: nowhere) and how long all took."""

    allocation: FoundRecipe
    output: Path | None
    seconds: float

    @property
    def recipe(self) -> Recipe:
        """The recipe that was found, for :func:`microscale.quantize`."""
        return self.allocation.recipe

    @property
    def notes(self) -> tuple[str, ...]:
        """What the measuring could not see."""
        return self.allocation.notes

    def as_json(self) -> dict[str, Any]:
        """Return the front, and of every layer what was measured and chosen."""
        found = self.allocation
        return {
            "recipe": None if self.output is None else str(self.output),
            "budget": {"amount": found.budget.amount, "unit": found.budget.unit.value},
            "sensitivity": found.sensitivity.value,
            "perplexity_before": found.table.perplexity,
            "result": found.solution.point,
            "front": found.solution.front,
            "uniform": found.solution.uniform,
            "layers": [_layer_json(one, found.table, found.solution.chosen[one.name]) for one in found.table.layers],
            "notes": [found.work, *found.notes],
            "seconds": self.seconds,
        }


def _layer_json(layer: AllocatedLayer, table: LayerTable, chosen: Candidate) -> dict[str, Any]:
    times = None if table.milliseconds is None else table.milliseconds[layer.name]
    chain = table.methods[layer.name][table.candidates.index(chosen)]
    return {
        "name": layer.name,
        "role": layer.role,
        "shape": list(layer.shape),
        "chosen": chosen.text,
        "method": None if chain is None else chain.text,
        "candidates": {
            candidate.text: {
                "sensitivity": table.sensitivity[layer.name][place],
                "bytes": table.num_bytes[layer.name][place],
                "milliseconds": None if times is None else times[place],
            }
            for place, candidate in enumerate(table.candidates)
        },
    }


def allocate(options: AllocateOptions, reporter: Reporter = SILENT) -> AllocateResult:
    """Find the best format for every layer under a budget; the model stays as it is.

    Raises:
        AllocationError: a budget or candidates that do not serve.
        CalibrationError, TextError: no text, or one that does not serve.
        MicroscaleError: words that cannot be read, a model that cannot, a place that cannot be written.
    """
    started = time.perf_counter()
    device = chosen_device(options.device)
    problem = AllocationProblem(
        budget=parse_budget(options.budget),
        candidates=parse_candidates(options.formats),
        fixed=tuple(parse_fixed(text) for text in options.fix),
        include=tuple(options.include),
        exclude=tuple(options.exclude),
        method=options.method,
        effort=options.effort,
        sensitivity=parse_sensitivity(options.sensitivity),
        grouping=Grouping.FUSED if options.fuse else Grouping.SINGLE,
        latency_tokens=options.latency_tokens,
        points=options.points,
    )
    parse_method(options.method, effort=options.effort)
    if options.plot is not None:
        check_picture(options.plot)
    if options.output is not None:
        check_text_target(options.output)
    text = replace(options.text, source=checked_source(options.text.source))
    if text.source is None:
        raise CalibrationError("allocation measures layers on text: give --calibration FILE (calibration=… in Python)")
    original = Original(options.model, tokenizer=options.tokenizer)
    model, tokenizer = original.whole(), original.tokenizer()
    with on_device(model, device), reporter.stage("measuring") as advance:
        found = allocate_model(model, problem, text, tokenizer=tokenizer, progress=advance, tell=reporter.note)
    if options.output is not None:
        _write(
            options.output,
            found,
            f"microscale allocate {original} --budget {options.budget} --formats {options.formats}",
        )
    if options.plot is not None:
        _draw(options.plot, str(original), found)
    return AllocateResult(allocation=found, output=options.output, seconds=time.perf_counter() - started)


def _write(output: Path, found: FoundRecipe, origin: str) -> None:
    point, limit = found.solution.point, found.budget
    comments = [
        origin,
        f"{amount_text(point.cost, limit.unit)} of {limit.text};"
        f" summed sensitivity ({found.sensitivity.value}) {point.sensitivity:.6g}",
    ]
    write_text_file(output, recipe_text(found.recipe, comments))


def _draw(path: Path, model: str, found: FoundRecipe) -> None:
    solution, unit = found.solution, found.budget.unit
    size = 1e6 if unit is BudgetUnit.BYTES else 1.0
    allocation_plot(
        path,
        [(point.cost / size, point.sensitivity) for point in solution.front],
        {name: (point.cost / size, point.sensitivity) for name, point in solution.uniform.items()},
        (solution.point.cost / size, solution.point.sensitivity),
        across="megabytes of the whole model" if unit is BudgetUnit.BYTES else unit.title,
        up=f"summed sensitivity ({found.sensitivity.value})",
        title=f"{model}: optimal allocation of formats",
    )


def allocate_model(
    model: Any,
    problem: AllocationProblem,
    text: TextOptions,
    *,
    tokenizer: Any,
    progress: Progress,
    tell: Callable[[str], None] = lambda note: None,
) -> FoundRecipe:
    """Measure a transformers model and find the optimum under a budget; the model stays as it is.

    Stacked experts are taken apart. ``tell`` gets what measuring will take, before it begins.

    Raises:
        AllocationError: a budget or candidates that do not serve, before anything is measured where that can be known.
        ModelError, RecipeError, TextError: see the rooms that are called.
    """
    layers, every = _checked_layers(model, problem)
    by_hand = {"method": problem.method, "effort": problem.effort}
    given = _windows(text, tokenizer, model, text.samples)
    taught = _method_windows(text, tokenizer, model) if needs_text(every, **by_hand) else None
    tokens = given.windows.numel()
    cost = measuring_cost(problem.sensitivity, len(layers), len(every), len(describe(model).blocks), tokens)
    work = _work(cost, problem, len(layers), len(every))
    tell(work)
    table = measure_table(
        model,
        layers,
        every,
        calibration=given,
        method_text=taught,
        sensitivity=problem.sensitivity,
        latency_tokens=problem.latency_tokens if problem.budget.unit is BudgetUnit.MILLISECONDS else None,
        progress=progress,
        check=lambda found: check_reachable(found, problem.budget),
        **by_hand,
    )
    solution = solve(table, problem.budget, points=problem.points)
    recipe = allocation_recipe(model, table, solution.chosen, **by_hand)
    cache = _cache_formats(problem)
    if cache:
        recipe = recipe.model_copy(update={"rules": (*recipe.rules, RecipeRule(match=KV_CACHE, weights=cache[-1]))})
    return FoundRecipe(
        recipe=recipe,
        solution=solution,
        table=table,
        budget=problem.budget,
        sensitivity=problem.sensitivity,
        work=work,
        notes=_notes(problem, every),
    )


def _checked_layers(model: Any, problem: AllocationProblem) -> tuple[tuple[AllocatedLayer, ...], tuple[Candidate, ...]]:
    """Return the layers and all candidates; what cannot be allocated is refused before any text is read."""
    check_solver()
    parse_method(problem.method, effort=problem.effort)
    if len(problem.candidates) < 2:
        only = ", ".join(candidate.text for candidate in problem.candidates)
        raise AllocationError(
            f"{only} alone leaves nothing to choose; name two formats or more (-f {only},mxfp8), or quantize all layers"
            f" alike: microscale quantize MODEL -f {only}"
        )
    if any(written.record is not None for written in _cache_formats(problem)):
        attention_modules(model)
    unstack_experts(model)
    layers, every = allocated_layers(
        model,
        problem.candidates,
        fixed=problem.fixed,
        include=problem.include,
        exclude=problem.exclude,
        grouping=problem.grouping,
    )
    check_budget(model, layers, every, problem.budget)
    names = [layer.name for layer in layers]
    check_candidates(model, names, every, method=problem.method, effort=problem.effort)
    return layers, every


def _cache_formats(problem: AllocationProblem) -> list[WrittenWeights]:
    """Return what was said of the KV cache; the last one counts."""
    return [candidate.weights for pattern, candidate in problem.fixed if pattern == KV_CACHE]


def _windows(text: TextOptions, tokenizer: Any, model: Any, samples: int) -> Calibration:
    found = read_windows(replace(text, samples=samples), tokenizer, model)
    if isinstance(text.source, Tensor):
        return replace(found, windows=found.windows[:samples])
    return found


def _method_windows(text: TextOptions, tokenizer: Any, model: Any) -> Calibration:
    """Return windows for the method: more than sensitivity needs, or as many where the text is short."""
    try:
        return _windows(text, tokenizer, model, max(text.samples, METHOD_WINDOWS))
    except TextError:
        return _windows(text, tokenizer, model, text.samples)


def _work(cost: MeasuringCost, problem: AllocationProblem, layers: int, candidates: int) -> str:
    """Return what measuring takes."""
    return (
        f"sensitivity {problem.sensitivity.value}: {counted(layers, 'layer')} in"
        f" {counted(candidates, 'candidate')}, the work of about"
        f" {cost.passes:.0f} passes over {counted(cost.tokens, 'token')}"
    )


def _notes(problem: AllocationProblem, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Return what measuring cannot see."""
    chains = [layer_method(c, problem.method, problem.effort) for c in candidates if not c.is_kept]
    if any(is_tied(chain) for chain in chains):
        return (f"method {problem.method} ties layers together: sensitivity is that of plain rounding",)
    return ()
