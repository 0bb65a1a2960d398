"""``microscale allocate``: the best format for every layer under a budget, as a recipe."""

from __future__ import annotations

from collections.abc import Mapping
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
    rows = [(f"{name} for all", point) for name, point in solution.uniform.items()]
    rows += [("", point) for point in solution.front]
    shown = sorted(rows, key=lambda row: row[1].cost)
    columns = [
        Column(title=limit.unit.title, is_number=True),
        Column(title="bits", is_number=True, drop=2),
        Column(title="sensitivity", is_number=True),
        Column(title="layers", drop=1),
    ]
    print_table("Pareto front, beside one format for all", columns, [_row(limit, name, p) for name, p in shown])
    by_role: dict[str, dict[str, int]] = {}
    for layer in found.table.layers:
        counts = by_role.setdefault(layer.role, {})
        word = solution.chosen[layer.name].text
        counts[word] = counts.get(word, 0) + 1
    cells = [(role, _counts_text(counts)) for role, counts in by_role.items()]
    print_table("Chosen, by role", [Column(title="role"), Column(title="layers")], cells)
    console.print(point_text(solution.point, limit), markup=False, soft_wrap=True)


def point_text(point: FrontPoint, limit: Budget) -> str:
    """Return what a point of the front costs, and the layers of each candidate."""
    from microscale.planning.budget import BudgetUnit, amount_text

    bits = "" if limit.unit is BudgetUnit.BITS else f" {point.bits_per_weight:.3f} bits per weight;"
    return (
        f"{amount_text(point.cost, limit.unit)} of {limit.text};{bits} summed sensitivity {point.sensitivity:.5g};"
        f" {_counts_text(point.counts)}"
    )


def _row(limit: Budget, name: str, point: FrontPoint) -> list[str]:
    from microscale.planning.budget import amount_text

    cost = amount_text(point.cost, limit.unit)
    layers = name or _counts_text(point.counts)
    return [cost, f"{point.bits_per_weight:.3f}", f"{point.sensitivity:.5g}", layers]


def _counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
