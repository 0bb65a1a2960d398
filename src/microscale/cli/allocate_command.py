"""``microscale allocate``: the best format for every layer under a budget, as a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from microscale.cli.output import Column, console, print_table
from microscale.cli.parameters import result_command
from microscale.jobs.allocate_options import AllocateOptions

if TYPE_CHECKING:
    from microscale.jobs.allocate import AllocateResult, FoundRecipe
    from microscale.planning.allocator import FrontPoint
    from microscale.planning.budget import Budget


@result_command(AllocateOptions)
def allocate(result: AllocateResult, options: AllocateOptions) -> None:
    """Measure how much each layer suffers in each format and find the optimum under a budget.

    Example: `microscale allocate MODEL --budget 4.5bits --calibration text.txt -o recipe.yaml`, then
    `microscale quantize MODEL --recipe recipe.yaml -o OUT`
    """
    _tell(result.allocation)
    for note in result.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(
        f"wrote {result.output} in {result.seconds:.1f} s; next: microscale quantize {options.model} --recipe"
        f" {result.output} -o OUT",
        markup=False,
        soft_wrap=True,
    )


def _tell(found: FoundRecipe) -> None:
    solution, limit = found.solution, found.budget
    named = {name: point for name, point in solution.uniform.items() if point != solution.point}
    rows = [(f"{name} for all", point) for name, point in named.items()]
    rows += [("", point) for point in solution.front if not any(point == other for other in named.values())]
    rows.sort(key=lambda row: row[1].cost)
    titles = _row_titles(limit, solution.point)
    columns = [Column(title=title, is_number=True, drop=drop) for title, drop in titles.items()]
    lines = [_row(titles, limit, point, name, is_chosen=point == solution.point) for name, point in rows]
    print_table("Pareto front, beside one format for all", [*columns, Column(title="layers", drop=1)], lines)
    by_role: dict[str, dict[str, int]] = {}
    for layer in found.table.layers:
        counts = by_role.setdefault(layer.role, {})
        word = solution.chosen[layer.name].text
        counts[word] = counts.get(word, 0) + 1
    cells = [(role, _counts_text(counts)) for role, counts in by_role.items()]
    print_table("Chosen, by role", [Column(title="role"), Column(title="layers")], cells)
    console.print(point_text(solution.point, limit), markup=False, soft_wrap=True)
    if found.table.perplexity is not None:
        console.print(
            f"perplexities are predicted: {found.table.perplexity:.2f}, measured unquantized on the calibration text,"
            " times exp(sensitivity)",
            soft_wrap=True,
        )


def _row_titles(limit: Budget, point: FrontPoint) -> dict[str, int]:
    """Return the titles of the numbers of a point, and which columns are dropped first where there is no room."""
    from microscale.planning.budget import BudgetUnit

    titles: dict[str, int] = {"milliseconds": 0} if limit.unit is BudgetUnit.MILLISECONDS else {}
    titles |= {"bits": 0, "model": 0, "model bits": 3, "sensitivity": 2}
    return titles | ({} if point.perplexity is None else {"perplexity": 0})


def _row(titles: Iterable[str], limit: Budget, point: FrontPoint, name: str, *, is_chosen: bool) -> list[str]:
    from microscale.nn.sizes import size_text

    texts = {
        "milliseconds": f"{point.cost:.3f}",
        "bits": f"{point.bits_per_weight:.3f}",
        "model": size_text(point.whole.num_bytes),
        "model bits": f"{point.whole.bits_per_weight:.2f}",
        "sensitivity": f"{point.sensitivity:.4g}",
        "perplexity": "" if point.perplexity is None else f"{point.perplexity:.2f}",
    }
    layers = name or _counts_text(point.counts)
    return [*(texts[title] for title in titles), f"chosen: {layers}" if is_chosen else layers]


def point_text(point: FrontPoint, limit: Budget) -> str:
    """Return what a point of the front costs, and the layers of each candidate."""
    from microscale.nn.sizes import size_text
    from microscale.planning.budget import BudgetUnit, amount_text

    bits = "" if limit.unit is BudgetUnit.BITS else f" {point.bits_per_weight:.3f} bits per weight;"
    words = "" if point.perplexity is None else f" predicted perplexity {point.perplexity:.2f};"
    whole = f"whole model {size_text(point.whole.num_bytes)}, {point.whole.bits_per_weight:.3f} bits per weight"
    return (
        f"{amount_text(point.cost, limit.unit)} of {limit.text};{bits} {whole}; summed sensitivity"
        f" {point.sensitivity:.5g};{words} {_counts_text(point.counts)}"
    )


def _counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
