"""``microscale study``: models × formats × methods × tasks, resumable, in one results file and one page."""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from microscale import __version__
from microscale.checkpoint import check_text_target, write_text_file
from microscale.cli.output import (
    Column,
    JsonOption,
    command,
    console,
    print_json,
    print_table,
    progress_bar,
    tell_missing_kernels,
)
from microscale.cli.study_executor import QuantizeAndScore, check_texts
from microscale.errors import StudyError
from microscale.evaluation import find_task
from microscale.report import StudyCell, StudyReportRow, study_html
from microscale.studies import (
    RunState,
    Study,
    StudyRow,
    StudyStep,
    StudyStore,
    load_study,
    pareto_front,
    run_study,
    select_runs,
    study_rows,
    study_runs,
)


@command
def study(
    file: Annotated[Path, typer.Argument(help="The study as YAML; docs/evaluation.md has an example.")],
    results: Annotated[
        Path | None, typer.Option("--results", help="Results file (default: beside the study, ending in .sqlite).")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="The page to write (default: beside the study, ending in .html).")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Run only what matches 'MODEL FORMAT METHOD', e.g. 'mxfp4 gptq'.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what failed before.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing, show what is known.")] = False,
    imports: Annotated[
        list[Path] | None, typer.Option("--import", help="First take the finished runs of another results file.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where models run: cpu, cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Run a study: quantize every model in every format by every method, score each, print and write what was found.

    An interrupted study goes on where it was. A run that fails is noted and does not stop the others;
    the exit status is 1 then.

    Example: `microscale study study.yaml --only 'mxfp4 *'`
    """
    plan = load_study(file)
    select_runs(study_runs(plan), only or [])
    place, page = results or file.with_suffix(".sqlite"), html or file.with_suffix(".html")
    check_text_target(page)
    if report_only and not imports and not place.exists():
        raise StudyError(_nothing_known(file, place))
    store = StudyStore(place)
    try:
        for other in imports or []:
            count = store.merge(other)
            if not as_json:
                console.print(f"{count} run(s) taken from {other}", markup=False)
        if not report_only:
            tell_missing_kernels()
            _check(plan, device)
            with progress_bar("study") as advance:

                def tell(step: StudyStep) -> None:
                    advance(step.done, step.total, step.label)

                executor = QuantizeAndScore(plan, device=device)
                run_study(plan, store, executor, only=only or [], retry=retry_failed, progress=tell)
        rows = study_rows(plan, store)
    finally:
        store.close()
    if report_only and not any(row.state in (RunState.DONE, RunState.FAILED) or any(row.cells) for row in rows):
        raise StudyError(_nothing_known(file, place))
    write_text_file(page, _page(plan, rows, file))
    if as_json:
        print_json([_as_dict(row, plan) for row in rows])
    else:
        _print_rows(plan, rows)
        console.print(f"wrote {page}", markup=False)
    if not report_only and any(row.state is RunState.FAILED for row in rows):
        raise typer.Exit(1)


def _nothing_known(file: Path, results: Path) -> str:
    return (
        f"{results} has no result of this study, so there is nothing to report: run `microscale study {file}` first,"
        " or name the results with --results or --import"
    )


def _check(plan: Study, device: str) -> None:
    """Refuse what would fail in every run."""
    check_texts(plan)
    if plan.task_data is not None and not Path(plan.place(plan.task_data)).is_dir():
        raise StudyError(f"task_data {plan.folder / plan.task_data} is no folder; paths begin at the study file")
    for task in plan.tasks:
        if task.task is not None and find_task(task.task).runs_code:
            raise StudyError(f"task {task.task} runs code, which a study does not do; use `microscale eval`")
    if device != "cpu" and not torch.cuda.is_available():
        raise StudyError(f"device {device!r} was asked for, but torch sees no GPU here")


def _print_rows(plan: Study, rows: Sequence[StudyRow]) -> None:
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
            word = "failed" if row.state is RunState.FAILED else "note"
            console.print(f"{word}: {row.model} {row.format} {row.method}: {row.message}", markup=False, soft_wrap=True)
    unfinished = sum(row.state in (RunState.WAITING, RunState.RUNNING) for row in rows)
    if unfinished:
        console.print(f"{unfinished} run(s) are not finished; the same command goes on")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _page(plan: Study, rows: Sequence[StudyRow], file: Path) -> str:
    facts = {
        "models": ", ".join(model.label for model in plan.models),
        "tasks": ", ".join(task.key for task in plan.tasks),
        "calibration": "none"
        if plan.calibration is None
        else f"{Path(plan.calibration.text).name}, {plan.calibration.samples} × {plan.calibration.window} tokens",
        "effort, seed": f"{plan.effort}, {plan.seed}",
        "machines": ", ".join(dict.fromkeys(row.machine for row in rows if row.machine)) or "–",
        "versions": f"microscale {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
    }
    tasks = [task.label for task in plan.tasks]
    return study_html(plan.name or f"Study {file.stem}", report_rows(rows), tasks=tasks, facts=facts)


def report_rows(rows: Sequence[StudyRow]) -> list[StudyReportRow]:
    """Translate results into the rows of the page; the front is that of each model."""
    fronts: set[int] = set()
    for model in dict.fromkeys(row.model for row in rows):
        places = [
            place
            for place, row in enumerate(rows)
            if row.model == model and row.bits_per_weight is not None and row.recovery is not None
        ]
        points = [(rows[place].bits_per_weight or 0.0, rows[place].recovery or 0.0) for place in places]
        fronts |= {places[found] for found in pareto_front(points)}
    return [
        StudyReportRow(
            model=row.model,
            format=row.format,
            method=row.method,
            state=row.state.value,
            message=row.message,
            bits_per_weight=row.bits_per_weight,
            num_bytes=row.num_bytes,
            seconds=row.quantize_seconds,
            score_seconds=row.score_seconds,
            peak_bytes=row.peak_bytes,
            recovery=row.recovery,
            gap_closure=row.gap_closure,
            cells=tuple(
                None
                if cell is None
                else StudyCell(
                    value=cell.value, stderr=cell.stderr, recovery=cell.recovery, gap_closure=cell.gap_closure
                )
                for cell in row.cells
            ),
            is_on_front=place in fronts,
        )
        for place, row in enumerate(rows)
    ]


def _as_dict(row: StudyRow, plan: Study) -> dict[str, Any]:
    found = dataclasses.asdict(row)
    found["state"] = row.state.value
    found["tasks"] = {
        task.label: None if cell is None else dataclasses.asdict(cell)
        for task, cell in zip(plan.tasks, row.cells, strict=True)
    }
    del found["cells"]
    return found
