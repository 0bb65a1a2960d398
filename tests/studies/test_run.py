"""Studies with a made-up executor: the queue, interrupts, failures, selection, merging, and what the rows say."""

from __future__ import annotations

import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microscale.errors import FormatError, StudyError
from microscale.kernels import Operation
from microscale.kernels.dispatch import note_executions
from microscale.studies import (
    PreparedModel,
    RunState,
    Study,
    StudyRun,
    StudyScore,
    StudyStep,
    StudyStore,
    StudyTask,
    load_study,
    pareto_front,
    run_study,
    select_runs,
    study_rows,
    study_runs,
)

TEXT = """\
models: [a, {path: b/c, name: second}]
formats: [mxfp8, {weights: mxfp4, activations: none, name: w4}]
methods: [rtn, {method: gptq, name: good, formats: [w4]}]
tasks:
  - {text: book.txt, tokens: 100}
  - {task: piqa, limit: 5}
"""
LABELS = ["none unquantized", "mxfp8 rtn", "w4 rtn", "w4 good"]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "s.yaml").write_text(TEXT)
    return load_study(tmp_path / "s.yaml")


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    return StudyStore(tmp_path / "s.sqlite")


class Fake:
    """Perplexity 20 unquantized, 24 by RTN, 21 by another method; accuracies 0.6, 0.5, 0.575; breaks where told to."""

    def __init__(self, breaks: Callable[[StudyRun, str], BaseException | None] = lambda run, step: None) -> None:
        self.breaks = breaks
        self.log: list[str] = []

    def _note(self, run: StudyRun, step: str) -> None:
        self.log.append(f"{run.label}: {step}")
        error = self.breaks(run, step)
        if error is not None:
            raise error

    machine: str = "a test"

    def prepare(self, run: StudyRun) -> PreparedModel:
        self._note(run, "prepare")
        return PreparedModel(model=run, bits_per_weight=16.0 if run.weights is None else 4.25, num_bytes=1000)

    def score(self, prepared: PreparedModel, run: StudyRun, task: StudyTask) -> Sequence[StudyScore]:
        self._note(run, task.label)
        kind = 0 if run.method is None else 1 if str(run.method.method) == "rtn" else 2
        if task.text is not None:
            return [score("perplexity", (20.0, 24.0, 21.0)[kind], better="lower")]
        return [score("acc_norm", 0.1, is_main=False), score("acc", (0.6, 0.5, 0.575)[kind], stderr=0.02)]


def score(metric: str, value: float, *, better: str = "higher", is_main: bool = True, stderr: Any = None) -> StudyScore:
    return StudyScore(
        task_key="",
        metric=metric,
        value=value,
        stderr=stderr,
        samples=5,
        is_main=is_main,
        is_higher_better=better == "higher",
        seconds=0.0,
    )


def test_the_runs_of_a_study(study: Study) -> None:
    runs = study_runs(study)
    assert [run.label for run in runs] == [f"{model} {label}" for model in ("a", "second") for label in LABELS]
    assert [(run.weights, run.activations) for run in runs[:3]] == [(None, None), ("mxfp8", "mxfp8"), ("mxfp4", None)]
    assert len({run.key for run in runs}) == 8


def test_everything_runs_once(study: Study, store: StudyStore) -> None:
    fake, steps = Fake(), []
    run_study(study, store, fake, progress=steps.append)
    assert len(fake.log) == 8 * 3
    assert {run.state for run in store.runs().values()} == {RunState.DONE}
    assert all(run.peak_bytes and run.machine == "a test" and run.finished for run in store.runs().values())
    last = steps[-1]
    assert isinstance(last, StudyStep) and (last.done, last.total, last.seconds_left) == (24, 24, 0.0)
    again = Fake()
    run_study(study, store, again)
    assert again.log == []


def test_recovery_and_gap_closure(study: Study, store: StudyStore) -> None:
    run_study(study, store, Fake())
    base, rtn8, rtn4, good = study_rows(study, store)[:4]
    assert base.recovery == pytest.approx(100) and base.bits_per_weight == 16.0
    book, piqa = good.cells
    assert book is not None and piqa is not None
    assert book.recovery == pytest.approx(100 * 20 / 21) and book.gap_closure == pytest.approx(75)
    assert piqa.metric == "acc" and piqa.stderr == 0.02
    assert piqa.recovery == pytest.approx(100 * 0.575 / 0.6) and piqa.gap_closure == pytest.approx(75)
    assert good.recovery == pytest.approx((100 * 20 / 21 + 100 * 0.575 / 0.6) / 2)
    assert good.gap_closure == pytest.approx(75) and rtn4.gap_closure == pytest.approx(0)
    assert rtn8.recovery == rtn4.recovery


def stop_at(label: str, step: str, error: BaseException) -> Callable[[StudyRun, str], BaseException | None]:
    return lambda run, now: error if (run.label, now) == (label, step) else None


@pytest.mark.parametrize("step", ["prepare", "book", "piqa"])
def test_an_interrupt_loses_nothing(step: str, study: Study, store: StudyStore) -> None:
    first = Fake(stop_at("a w4 rtn", step, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run_study(study, store, first)
    states = [run.state for run in store.runs().values()]
    assert states.count(RunState.DONE) == 2 and states.count(RunState.WAITING) == 6
    second = Fake()
    run_study(study, store, second)
    assert {run.state for run in store.runs().values()} == {RunState.DONE}
    scored = ["book", "piqa"].index(step) if step != "prepare" else 0
    assert second.log[: 3 - scored] == [
        "a w4 rtn: prepare",
        *(f"a w4 rtn: {task}" for task in ("book", "piqa")[scored:]),
    ]
    assert len(second.log) == 3 * 6 - scored


def test_a_crash_while_running(study: Study, store: StudyStore) -> None:
    """What a killed process left as running is waiting for the next one, and done where all scores are there."""
    run_study(study, store, Fake())
    keys = list(store.runs())
    store.update(keys[0], RunState.RUNNING)
    fake = Fake()
    run_study(study, store, fake)
    assert fake.log == [] and store.runs()[keys[0]].state is RunState.DONE


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), FormatError("no"), MemoryError(), AssertionError()])
def test_a_failure_stops_no_other_run(error: Exception, study: Study, store: StudyStore) -> None:
    fake, steps = Fake(stop_at("a mxfp8 rtn", "prepare", error)), []
    run_study(study, store, fake, progress=steps.append)
    assert len(fake.log) == 7 * 3 + 1 and (steps[-1].done, steps[-1].total) == (24, 24)
    failed = [run for run in store.runs().values() if run.state is RunState.FAILED]
    assert len(failed) == 1 and failed[0].message == f"{type(error).__name__}: {error}"
    (row,) = [row for row in study_rows(study, store) if row.state is RunState.FAILED]
    assert row.cells == (None, None) and row.recovery is None
    same = Fake()
    run_study(study, store, same)
    assert same.log == []
    retried = Fake()
    run_study(study, store, retried, retry=True)
    assert retried.log == ["a mxfp8 rtn: prepare", "a mxfp8 rtn: book", "a mxfp8 rtn: piqa"]
    assert all(run.state is RunState.DONE and not run.message for run in store.runs().values())


def test_a_new_task_is_scored_alone(study: Study, store: StudyStore) -> None:
    run_study(study, store, Fake())
    more = study.model_copy(update={"tasks": (*study.tasks, StudyTask(task="boolq"))})
    fake = Fake()
    run_study(more, store, fake)
    assert fake.log[:2] == ["a none unquantized: prepare", "a none unquantized: boolq"] and len(fake.log) == 16


def test_other_settings_are_other_runs(study: Study) -> None:
    keys = {run.key for run in study_runs(study)}
    other = {run.key for run in study_runs(study.model_copy(update={"seed": 1}))}
    assert len(keys & other) == 2  # the unquantized ones


def test_only(study: Study, store: StudyStore) -> None:
    runs = study_runs(study)
    assert [run.label for run in select_runs(runs, ["second*rtn"])] == ["second mxfp8 rtn", "second w4 rtn"]
    assert [run.label for run in select_runs(runs, ["a w4", "second none"])] == [
        "a w4 rtn",
        "a w4 good",
        "second none unquantized",
    ]
    with pytest.raises(StudyError, match="no run matches zzz"):
        select_runs(runs, ["zzz"])
    fake = Fake()
    run_study(study, store, fake, only=["good"])
    assert [line for line in fake.log if "prepare" in line] == ["a w4 good: prepare", "second w4 good: prepare"]
    assert len(study_rows(study, store)) == 2


def test_merging(study: Study, store: StudyStore, tmp_path: Path) -> None:
    run_study(study, store, Fake(), only=["a "])
    elsewhere = StudyStore(tmp_path / "gpu.sqlite")
    run_study(study, elsewhere, Fake(stop_at("second w4 good", "prepare", RuntimeError("x"))))
    elsewhere.close()
    assert store.merge(tmp_path / "gpu.sqlite") == 3
    assert store.merge(tmp_path / "gpu.sqlite") == 0
    fake = Fake()
    run_study(study, store, fake)
    assert fake.log == ["second w4 good: prepare", "second w4 good: book", "second w4 good: piqa"]
    assert all(row.recovery is not None for row in study_rows(study, store))


class Running(Fake):
    """Runs one linear call for each score of a quantized model."""

    def score(self, prepared: PreparedModel, run: StudyRun, task: StudyTask) -> Sequence[StudyScore]:
        if run.method is not None:
            note_executions(Counter({(Operation.LINEAR, "here"): 3}))
        return super().score(prepared, run, task)


def test_what_ran_is_kept_and_merged(study: Study, store: StudyStore, tmp_path: Path) -> None:
    run_study(study, store, Running(), only=["a none", "a w4 rtn"])
    assert [row.executed for row in study_rows(study, store)] == [{}, {"linear": {"here": 6}}]
    other = StudyStore(tmp_path / "other.sqlite")
    assert other.merge(store.path) == 2
    assert study_rows(study, other) == study_rows(study, store)


def test_a_file_of_before_what_ran_was_counted(study: Study, store: StudyStore) -> None:
    """It is read as it is, and gets its table when work goes on."""
    run_study(study, store, Running(), only=["a none"])
    with sqlite3.connect(store.path) as database:
        database.execute("DROP TABLE executions")
    again = StudyStore(store.path)
    assert [row.executed for row in study_rows(study, again)] == [{}] and again.executed() == {}
    run_study(study, again, Running(), only=["a w4 rtn"])
    assert study_rows(study, again)[-1].executed == {"linear": {"here": 6}}


def test_one_worker_at_a_time(study: Study, store: StudyStore, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    second = StudyStore(tmp_path / "s.sqlite")
    with store.working(), pytest.raises(StudyError, match="another process works on"):
        run_study(study, second, Fake())
    run_study(study, second, Fake())
    assert len(store.runs()) == 8


def test_nan_and_inf(study: Study, store: StudyStore) -> None:
    class Broken(Fake):
        def score(self, prepared: PreparedModel, run: StudyRun, task: StudyTask) -> Sequence[StudyScore]:
            value = 20.0 if run.method is None else math.nan if run.format == "mxfp8" else math.inf
            return [score("perplexity", value, better="lower")]

    run_study(study, store, Broken())
    _, nan, inf = study_rows(study, store)[:3]
    assert nan.cells[0] is not None and nan.cells[0].value is None and nan.recovery is None
    assert inf.cells[0] is not None and inf.cells[0].value == math.inf and inf.cells[0].recovery == 0.0
    assert inf.gap_closure is None


@pytest.mark.parametrize("content", [b"no database, but a text that is long enough " * 40, "other", "version"])
def test_other_files(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE x (y)" if content == "other" else "PRAGMA user_version = 9")
    with pytest.raises(StudyError, match=r"r\.sqlite"):
        StudyStore(path)
    with pytest.raises(StudyError, match="is not a file"):
        StudyStore(tmp_path / "new.sqlite").merge(tmp_path / "absent.sqlite")


POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12)


@given(POINTS)
def test_the_front_by_its_definition(points: list[tuple[float, float]]) -> None:
    def is_beaten(place: int) -> bool:
        cost, gain = points[place]
        return any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)

    front = pareto_front(points)
    assert {points[place] for place in front} == {p for place, p in enumerate(points) if not is_beaten(place)}
    assert [points[place][0] for place in front] == sorted(points[place][0] for place in front)
