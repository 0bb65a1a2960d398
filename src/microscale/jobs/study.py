"""Run a study: quantize every model in every format by every method, score each, and write results and page."""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from microscale.checkpoint.writer import check_text_target, write_text_file
from microscale.errors import StudyError, TextError, counted
from microscale.evaluation.tasks import find_task
from microscale.jobs.reporting import SILENT, Reporter
from microscale.jobs.small_options import StudyOptions
from microscale.jobs.study_executor import QuantizeAndScore
from microscale.layerwise.devices import chosen_device
from microscale.planning.executed import linear_words, summed
from microscale.report.study import study_html
from microscale.report.study_rows import StudyCell, StudyReportRow
from microscale.studies.file import Study, load_study
from microscale.studies.results import StudyRow, pareto_front, shared_values, study_rows
from microscale.studies.run import FailedRuns, run_study, select_runs, study_runs
from microscale.studies.store import RunState, StudyStore
from microscale.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """The rows of a study that are known, where its page was written, and how many runs came from which other file."""

    plan: Study
    rows: tuple[StudyRow, ...]
    page: Path
    imported: tuple[tuple[str, int], ...]

    @property
    def has_failures(self) -> bool:
        """Whether a run failed."""
        return any(row.state is RunState.FAILED for row in self.rows)

    def as_json(self) -> list[dict[str, Any]]:
        """Return one object for each row, the scores by the names of the tasks."""
        return [_row_json(row, self.plan) for row in self.rows]


def study(options: StudyOptions, reporter: Reporter = SILENT) -> StudyResult:
    """Work off what is not finished of a study, and write its page; a run that fails is noted and stops no other.

    Raises:
        StudyError: no study, nothing known of it, another process at work, or results that cannot be used.
        TextError: a text that does not exist.
        DeviceError: a device that is not here.
        CheckpointWriteError: the page cannot be written.
    """
    plan = load_study(options.file)
    select_runs(study_runs(plan), options.only)
    place, page = options.results or options.file.with_suffix(".sqlite"), options.html
    page = page or options.file.with_suffix(".html")
    check_text_target(page)
    if options.report_only and not options.imports and not place.exists():
        raise StudyError(_nothing_known(options.file, place))
    store = StudyStore(place)
    try:
        imported = tuple((other, store.merge(Path(other))) for other in options.imports)
        if not options.report_only:
            _run(plan, store, options, reporter)
        rows = study_rows(plan, store)
    finally:
        store.close()
    if options.report_only and not any(_is_known(row) for row in rows):
        raise StudyError(_nothing_known(options.file, place))
    write_text_file(page, _page(plan, rows, options.file))
    return StudyResult(plan=plan, rows=tuple(rows), page=page, imported=imported)


def _run(plan: Study, store: StudyStore, options: StudyOptions, reporter: Reporter) -> None:
    check_study(plan)
    device = chosen_device(options.device)
    with reporter.stage("study") as advance:
        failed = FailedRuns.RETRY if options.retry_failed else FailedRuns.LEAVE
        executor = QuantizeAndScore(plan, device=device)
        run_study(plan, store, executor, only=options.only, failed=failed, progress=advance)


def check_study(plan: Study) -> None:
    """Refuse what would fail in every run, before hours of work.

    Raises:
        StudyError: a folder that is not there, or a task that runs code.
        TextError: a text that does not exist.
    """
    texts = [task.text for task in plan.tasks if task.text is not None]
    texts += [] if plan.calibration is None else [plan.calibration.text]
    for text in texts:
        if not Path(plan.place(text)).is_file():
            raise TextError(f"text {plan.folder / text} does not exist; paths begin at the study file")
    if plan.task_data is not None and not Path(plan.place(plan.task_data)).is_dir():
        raise StudyError(f"task_data {plan.folder / plan.task_data} is no folder; paths begin at the study file")
    for task in plan.tasks:
        if task.task is not None and find_task(task.task).runs_code:
            raise StudyError(f"task {task.task} runs code, which a study does not do; use `microscale eval`")


def _is_known(row: StudyRow) -> bool:
    return row.state in (RunState.DONE, RunState.FAILED) or any(row.cells)


def _nothing_known(file: Path, results: Path) -> str:
    return (
        f"{results} has no result of this study, so there is nothing to report: run `microscale study {file}` first,"
        " or name the results with --results or --import"
    )


def _page(plan: Study, rows: Sequence[StudyRow], file: Path) -> str:
    facts = {
        "models": ", ".join(model.label for model in plan.models),
        "tasks": ", ".join(task.key for task in plan.tasks),
        "calibration": "none"
        if plan.calibration is None
        else f"{Path(plan.calibration.text).name}, {plan.calibration.samples} ×"
        f" {counted(plan.calibration.window, 'token')}",
        "effort, seed": f"{plan.effort}, {plan.seed}",
        "machines": ", ".join(dict.fromkeys(row.machine for row in rows if row.machine)) or "–",
        "executed": linear_words(summed(row.executed for row in rows)),
        "versions": f"microscale {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
    }
    tasks = [task.label for task in plan.tasks]
    return study_html(plan.name or f"Study {file.stem}", report_rows(rows), tasks=tasks, facts=facts)


def report_rows(rows: Sequence[StudyRow]) -> list[StudyReportRow]:
    """Translate results into the rows of the page; the front is that of each model."""
    fronts = fronts_of(rows)
    found: list[StudyReportRow] = []
    for place, row in enumerate(rows):
        cells = tuple(None if cell is None else StudyCell(**shared_values(cell, StudyCell)) for cell in row.cells)
        own: dict[str, Any] = {"state": row.state.value, "cells": cells, "is_on_front": place in fronts}
        found.append(StudyReportRow(**(shared_values(row, StudyReportRow) | own)))
    return found


def fronts_of(rows: Sequence[StudyRow]) -> set[int]:
    """Return the places of the rows that none of the same model beats in bits and recovery."""
    fronts: set[int] = set()
    for model in dict.fromkeys(row.model for row in rows):
        points = {
            place: (row.bits_per_weight, row.recovery)
            for place, row in enumerate(rows)
            if row.model == model and row.bits_per_weight is not None and row.recovery is not None
        }
        places = list(points)
        fronts |= {places[found] for found in pareto_front(list(points.values()))}
    return fronts


def _row_json(row: StudyRow, plan: Study) -> dict[str, Any]:
    found = dataclasses.asdict(row)
    found["state"] = row.state.value
    found["tasks"] = {
        task.label: None if cell is None else dataclasses.asdict(cell)
        for task, cell in zip(plan.tasks, row.cells, strict=True)
    }
    del found["cells"], found["executed"]
    return found | {"executed": row.executed}
