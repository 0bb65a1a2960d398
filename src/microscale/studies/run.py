"""Run a study: quantize each model in each format by each method, score it on each task, and keep what was found.

The work itself comes as an executor, so this room knows neither how a model is loaded nor how a task is run. A run that
fails is stored with its message and the next one begins; an interrupt leaves finished runs and scores as they are.
"""

from __future__ import annotations

import datetime
import fnmatch
import math
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

import torch

from microscale.algorithms.contract import Progress
from microscale.errors import MicroscaleError, StudyError
from microscale.kernels import count_executions
from microscale.planning.bench import resident_bytes
from microscale.planning.executed import by_name
from microscale.studies.file import Study, StudyMethod, StudyModel, StudyTask
from microscale.studies.store import RunState, StudyScore, StudyStore

UNQUANTIZED = "unquantized"
FAILURES = (
    MicroscaleError,
    RuntimeError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    OSError,
    ImportError,
    AssertionError,
    MemoryError,
)
"""What ends one run and not the study: our errors, and what libraries raise about a model that they cannot take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """One cell of a study. ``weights`` is None for the unquantized model; ``method`` is then None too."""

    key: str
    model: StudyModel
    format: str
    weights: str | None
    activations: str | None
    method: StudyMethod | None
    rounding: tuple[tuple[str, str], ...] = ()
    """What is said of attention, by option."""

    @property
    def method_label(self) -> str:
        """The method's name, ``unquantized`` without one."""
        return UNQUANTIZED if self.method is None else self.method.label

    @property
    def label(self) -> str:
        """Model, format and method, as ``--only`` matches them."""
        return f"{self.model.label} {self.format} {self.method_label}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """A quantized model, ready to be scored, its size, and what is to be said of it."""

    model: Any
    bits_per_weight: float
    num_bytes: int
    notes: tuple[str, ...] = ()


class StudyExecutor(Protocol):
    """How models are made and scored; ``machine`` is what this runs on, in words."""

    @property
    def machine(self) -> str:
        """The processor or GPU; never the name of a host."""
        ...

    def prepare(self, run: StudyRun) -> PreparedModel:
        """Load and quantize the model of a run."""
        ...

    def score(self, prepared: PreparedModel, run: StudyRun, task: StudyTask) -> Sequence[StudyScore]:
        """Score it on one task; the task's key and the seconds are filled in by the caller."""
        ...


def study_runs(study: Study) -> list[StudyRun]:
    """Return every run of a study: for each model the unquantized one, then formats by methods."""
    runs: list[StudyRun] = []
    for model in study.models:
        key = f"{model.label} | {UNQUANTIZED}"
        runs.append(StudyRun(key=key, model=model, format="none", weights=None, activations=None, method=None))
        for format in study.formats:
            label = study.format_label(format)
            activations = study.activations_of(format)
            for method in study.methods:
                if method.formats and label not in method.formats:
                    continue
                words = (str(format.weights), str(activations or "none"), *format.attention_words, method.label)
                spec = " | ".join(words)
                runs.append(
                    StudyRun(
                        key=f"{model.label} | {spec} | {study.settings_hash(method)}",
                        model=model,
                        format=label,
                        weights=str(format.weights),
                        activations=None if activations is None else str(activations),
                        method=method,
                        rounding=tuple((side, str(given)) for side, given in format.rounding.items()),
                    )
                )
    return runs


def select_runs(runs: Sequence[StudyRun], only: Sequence[str]) -> list[StudyRun]:
    """Return the runs that hold one of several globs in ``MODEL FORMAT METHOD``; all without globs.

    Raises:
        StudyError: none does.
    """
    chosen = [run for run in runs if not only or any(_matches(run, glob) for glob in only)]
    if not chosen:
        raise StudyError(f"no run matches {' or '.join(only)}; they read e.g. {runs[-1].label!r}")
    return chosen


def _matches(run: StudyRun, glob: str) -> bool:
    return fnmatch.fnmatchcase(run.label, f"*{glob}*")


class FailedRuns(Enum):
    """What becomes of runs that failed before."""

    LEAVE = "leave"
    RETRY = "retry"


def run_study(
    study: Study,
    store: StudyStore,
    executor: StudyExecutor,
    *,
    only: Sequence[str] = (),
    failed: FailedRuns = FailedRuns.LEAVE,
    progress: Progress = lambda done, total, label: None,
) -> None:
    """Work off what is not finished; ``failed`` says what becomes of runs that failed before.

    Raises:
        StudyError: another process works on the results, or they cannot be written.
    """
    runs = select_runs(study_runs(study), only)
    with store.working():
        for run in runs:
            store.add(run.key, model=run.model.label, format=run.format, method=run.method_label)
        todo = [(run, missing) for run in runs if (missing := _missing(study, store, run, failed))]
        for run in runs:
            if not _missing(study, store, run, FailedRuns.RETRY) and store.runs()[run.key].state is RunState.WAITING:
                store.update(run.key, RunState.DONE)  # interrupted after its last score
        counter = _Counter(total=sum(1 + len(missing) for _, missing in todo), report=progress)
        for run, missing in todo:
            _run_one(run, missing, store, executor, counter)


def _missing(study: Study, store: StudyStore, run: StudyRun, failed: FailedRuns) -> list[StudyTask]:
    """Return the tasks of a run that have no score yet."""
    if store.runs()[run.key].state is RunState.FAILED and failed is FailedRuns.LEAVE:
        return []
    scored = store.scores().get(run.key, {})
    return [task for task in study.tasks if task.key not in scored]


def _run_one(
    run: StudyRun, tasks: Sequence[StudyTask], store: StudyStore, executor: StudyExecutor, counter: _Counter
) -> None:
    counter.begin(run.label)
    done_after = counter.done + 1 + len(tasks)
    store.update(run.key, RunState.RUNNING, message="", machine=executor.machine)
    try:
        with _peak_memory() as peak:
            started = time.perf_counter()
            prepared = executor.prepare(run)
            seconds = time.perf_counter() - started
            store.update(
                run.key,
                RunState.RUNNING,
                bits_per_weight=prepared.bits_per_weight,
                num_bytes=prepared.num_bytes,
                quantize_seconds=seconds,
            )
            counter.move_to(counter.done + 1)
            for task in tasks:
                counter.begin(f"{run.label}: {task.label}")
                started = time.perf_counter()
                with count_executions() as counts:
                    found = executor.score(prepared, run, task)
                seconds = time.perf_counter() - started
                store.add_scores(run.key, [_completed(score, task, seconds) for score in found], by_name(counts))
                counter.move_to(counter.done + 1)
        finished = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        said = "; ".join(prepared.notes)
        store.update(run.key, RunState.DONE, message=said, peak_bytes=peak.bytes, finished=finished)
    except KeyboardInterrupt:
        store.update(run.key, RunState.WAITING)
        raise
    except StudyError:
        raise  # the results file itself
    except FAILURES as error:
        store.update(run.key, RunState.FAILED, message=f"{type(error).__name__}: {error}")
        counter.move_to(done_after)


def _completed(score: StudyScore, task: StudyTask, seconds: float) -> StudyScore:
    value = None if score.value is None or math.isnan(score.value) else score.value
    return replace(score, task_key=task.key, value=value, seconds=seconds)


@dataclass(slots=True)
class _Peak:
    bytes: int = 0


@contextmanager
def _peak_memory() -> Generator[_Peak, None, None]:
    """Watch the resident memory of this process, twenty times a second; what torch allocated on a GPU is added."""
    peak = _Peak(bytes=resident_bytes())
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.05):
            peak.bytes = max(peak.bytes, resident_bytes())

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()
        if torch.cuda.is_available():
            peak.bytes += torch.cuda.max_memory_allocated()


@dataclass(slots=True)
class _Counter:
    """Counts steps (a quantization or a task) and tells what runs now."""

    total: int
    report: Progress
    done: int = 0
    label: str = ""

    def begin(self, label: str) -> None:
        self.label = label
        self.move_to(self.done)

    def move_to(self, done: int) -> None:
        self.done = done
        self.report(done, self.total, self.label)
