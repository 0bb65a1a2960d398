"""What a study found: one row for each run, with recovery against the unquantized model and gap closure against RTN.

    recovery = 100 · score / score of the unquantized model          (higher is better)
    recovery = 100 · perplexity of the unquantized model / perplexity  (lower is better)
    gap closure = 100 · (RTN − x) / (RTN − unquantized)   with the same model and format, also in percent

The recovery of a run is the mean over its tasks' main metrics. A gap of less than ``SMALLEST_GAP`` of the unquantized
score is noise: no closure is given then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from microscale.algorithms.registry import PLAIN
from microscale.planning.executed import Executed, summed
from microscale.studies.file import Study
from microscale.studies.run import StudyRun, study_runs
from microscale.studies.store import RunState, StoredRun, StudyScore, StudyStore

SMALLEST_GAP = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCell:
    """The main metric of one task in one run; recovery and gap closure in percent, None where there is none."""

    task: str
    metric: str
    value: float | None
    stderr: float | None
    recovery: float | None
    gap_closure: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRow:
    """One run with everything that is known about it."""

    model: str
    format: str
    method: str
    state: RunState
    message: str
    bits_per_weight: float | None
    num_bytes: int | None
    quantize_seconds: float | None
    score_seconds: float
    peak_bytes: int | None
    machine: str
    recovery: float | None
    gap_closure: float | None
    cells: tuple[TaskCell | None, ...]
    """In the order of the study's tasks; None where there is no score."""
    executed: Executed
    """What ran while the tasks were scored; nothing for scores of before it was counted."""


def study_rows(study: Study, store: StudyStore) -> list[StudyRow]:
    """Return a row for each run of the study that the results file knows, in the order of the study."""
    stored, scores, executed = store.runs(), store.scores(), store.executed()
    runs = [run for run in study_runs(study) if run.key in stored]
    mains = {run.key: _mains(study, scores.get(run.key, {})) for run in runs}
    rows: list[StudyRow] = []
    for run in runs:
        base = next((mains[other.key] for other in runs if _is_base(other, run)), {})
        plain = next((mains[other.key] for other in runs if _is_plain(other, run)), {})
        cells = tuple(
            _cell(task.label, mains[run.key].get(task.key), base.get(task.key), plain.get(task.key))
            for task in study.tasks
        )
        ran = summed(executed.get(run.key, {}).get(task.key, {}) for task in study.tasks)
        rows.append(_row(run, stored[run.key], cells, ran))
    return rows


def shared_values(record: Any, kind: Any) -> dict[str, Any]:
    """Return the values of a record that another kind of record has under the same names."""
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: getattr(record, name) for name in names if hasattr(record, name)}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, gain) that none other beats, in order of cost.

    A point is beaten by one of at most its cost and at least its gain that is better in one of the two.
    """
    order = sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1]))
    front: list[int] = []
    best = -math.inf
    for place in order:
        if points[place][1] > best:
            front.append(place)
            best = points[place][1]
    return front


def _is_base(other: StudyRun, run: StudyRun) -> bool:
    return other.method is None and other.model == run.model


def _is_plain(other: StudyRun, run: StudyRun) -> bool:
    """Whether a run is the RTN of another's model and formats."""
    is_rounded = other.method is not None and other.method.method.pipeline().steps == (PLAIN,)
    return is_rounded and _formats(other) == _formats(run)


def _formats(run: StudyRun) -> tuple[object, ...]:
    return run.model, run.weights, run.activations, run.rounding


def _mains(study: Study, scores: Mapping[str, Sequence[StudyScore]]) -> dict[str, StudyScore]:
    mains: dict[str, StudyScore] = {}
    for task in study.tasks:
        main = next((score for score in scores.get(task.key, ()) if score.is_main), None)
        if main is not None:
            mains[task.key] = main
    return mains


def _cell(task: str, score: StudyScore | None, base: StudyScore | None, plain: StudyScore | None) -> TaskCell | None:
    if score is None:
        return None
    found: dict[str, Any] = {"recovery": _recovery(score, base), "gap_closure": _closure(score, base, plain)}
    return TaskCell(task=task, **shared_values(score, TaskCell), **found)


def _recovery(score: StudyScore, base: StudyScore | None) -> float | None:
    if base is None or score.value is None or base.value is None:
        return None
    if score.is_higher_better:
        return 100 * score.value / base.value if base.value else None
    if math.isinf(score.value):
        return 0.0
    return 100 * base.value / score.value if score.value else None


def _closure(score: StudyScore, base: StudyScore | None, plain: StudyScore | None) -> float | None:
    values = [None if one is None else one.value for one in (score, base, plain)]
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    value, unquantized, rtn = (float(one) for one in values if one is not None)
    gap = unquantized - rtn if score.is_higher_better else rtn - unquantized
    if gap <= SMALLEST_GAP * abs(unquantized):
        return None
    return 100 * (value - rtn if score.is_higher_better else rtn - value) / gap


def _row(run: StudyRun, stored: StoredRun, cells: tuple[TaskCell | None, ...], executed: Executed) -> StudyRow:
    known = [cell for cell in cells if cell is not None]
    labels: dict[str, Any] = {"model": run.model.label, "format": run.format, "method": run.method_label}
    return StudyRow(
        **(shared_values(stored, StudyRow) | labels),
        score_seconds=sum(cell.seconds for cell in known),
        recovery=_mean([cell.recovery for cell in known]) if len(known) == len(cells) else None,
        gap_closure=_mean([cell.gap_closure for cell in known if cell.gap_closure is not None]),
        cells=cells,
        executed=executed,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None
