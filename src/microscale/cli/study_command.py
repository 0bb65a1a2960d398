"""``microscale study``: models × formats × methods × tasks, resumable, in one results file and one page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from microscale.cli.output import Column, JsonOption, console, print_json, print_table, tell_missing_kernels
from microscale.cli.parameters import job_command
from microscale.cli.reporter import ConsoleReporter
from microscale.errors import counted
from microscale.jobs.small_options import StudyOptions

if TYPE_CHECKING:
    from microscale.jobs.study import StudyResult


@job_command(StudyOptions)
def study(options: StudyOptions, as_json: JsonOption = False) -> None:
    """Run a study: quantize every model in every format by every method, score each, print and write what was found.

    An interrupted study goes on where it was. A run that fails is noted and does not stop the others;
    the exit status is 1 then.

    Example: `microscale study study.yaml --only 'mxfp4 *'`
    """
    from microscale.jobs.study import study as study_job

    if not options.report_only:
        tell_missing_kernels()
    result = study_job(options, ConsoleReporter())
    if as_json:
        print_json(result)
    else:
        for other, count in result.imported:
            console.print(f"{counted(count, 'run')} taken from {other}", markup=False)
        _print_rows(result)
        console.print(f"wrote {result.page}", markup=False)
    if not options.report_only and result.has_failures:
        raise typer.Exit(1)


def _print_rows(result: StudyResult) -> None:
    plan, rows = result.plan, result.rows
    tasks = [task.label for task in plan.tasks]
    columns = [Column(title=title) for title in ("model", "format", "method")]
    columns += [Column(title=title, is_number=True) for title in ("bits", "recovery %", "closure %")]
    columns += [Column(title=title, is_number=True, drop=place + 3) for place, title in enumerate(tasks)]
    columns += [Column(title="quantize s", is_number=True, drop=1), Column(title="score s", is_number=True, drop=2)]
    lines = [
        (
            row.model,
            row.format,
            row.method,
            _number(row.bits_per_weight, 2),
            _number(row.recovery, 2),
            _number(row.gap_closure, 1),
            *(_number(None if cell is None else cell.value, 4) for cell in row.cells),
            _number(row.quantize_seconds, 1),
            _number(row.score_seconds, 1),
        )
        for row in rows
    ]
    print_table(plan.name or "Study", columns, lines)
    for row in rows:
        if row.message:
            word = "failed" if row.state.value == "failed" else "note"
            console.print(f"{word}: {row.model} {row.format} {row.method}: {row.message}", markup=False, soft_wrap=True)
    unfinished = sum(row.state.value in ("waiting", "running") for row in rows)
    if unfinished:
        console.print(f"not finished: {counted(unfinished, 'run')}; the same command goes on")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
