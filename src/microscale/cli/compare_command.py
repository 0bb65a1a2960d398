"""``microscale compare``: several formats on one model in one table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from microscale.cli.output import console
from microscale.cli.parameters import result_command
from microscale.jobs.small_options import CompareOptions

if TYPE_CHECKING:
    from microscale.jobs.compare import CompareResult

WIDE = 100
"""Columns of a terminal that has room for three modes with their differences."""


@result_command(CompareOptions)
def compare(found: CompareResult, options: CompareOptions) -> None:
    """Quantize a model to several formats and score each: weights alone, weights with activations, and everything.

    Example: `microscale compare MODEL --formats mxfp8,mxfp4,nvfp4 --text book.txt --tokens 17391`
    """
    console.print(_table(found))
    console.print(f"computed in {found.facts['computation']}", markup=False, soft_wrap=True)
    console.print("activations are rounded by each format's own rule; `quantize` says where a file layout has another")
    if options.html is not None:
        console.print(f"wrote {options.html}", markup=False)


def _table(found: CompareResult) -> Table:
    """Return the table of a comparison: one line for each format, all modes side by side."""
    from microscale.planning.comparison import EVERYTHING, MODES
    from microscale.report.comparison import DIFFERENCE, comparison_cells

    modes = {row.mode for row in found.rows[1:]}
    meaning = "w: weights quantized, w+a: weights and activations"
    meaning += ", all: head and attention too" if EVERYTHING in modes else ""
    has_room = len(modes) <= len(MODES) or console.width >= WIDE
    titles, lines = comparison_cells(found.report_rows)
    kept = [place for place, title in enumerate(titles) if has_room or not title.startswith(DIFFERENCE)]
    table = Table(title=f"Perplexity ({meaning})", title_justify="left")
    table.add_column(titles[0], overflow="fold")
    for place in kept[1:]:
        table.add_column(titles[place], justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*(line[place] for place in kept if place < len(line)))
    return table
