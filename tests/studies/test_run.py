"""Studies with a made-up executor: the queue, interrupts, failures, selection, merging, and what the rows say."""

from __future__ import annotations

import pytest

from fake_studies import LABELS, Fake, stop_at
from microscale.errors import FormatError, StudyError
from microscale.studies.file import Study, StudyTask
from microscale.studies.results import study_rows
from microscale.studies.run import FailedRuns, run_study, select_runs, study_runs
from microscale.studies.store import RunState, StudyStore


def test_the_runs_of_a_study(study: Study) -> None:
    runs = study_runs(study)
    assert [run.label for run in runs] == [f"{model} {label}" for model in ("a", "second") for label in LABELS]
    assert [(run.weights, run.activations) for run in runs[:3]] == [(None, None), ("mxfp8", "mxfp8"), ("mxfp4", None)]
    assert len({run.key for run in runs}) == 8


def test_everything_runs_once(study: Study, store: StudyStore) -> None:
    fake, steps = Fake(), []
    run_study(study, store, fake, progress=lambda done, total, label: steps.append((done, total)))
    assert len(fake.log) == 8 * 3
    assert {run.state for run in store.runs().values()} == {RunState.DONE}
    assert all(run.peak_bytes and run.machine == "a test" and run.finished for run in store.runs().values())
    assert [done for done, _ in steps] == sorted(done for done, _ in steps) and steps[-1] == (24, 24)
    again = Fake()
    run_study(study, store, again)
    assert again.log == []


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
    run_study(study, store, fake, progress=lambda done, total, label: steps.append((done, total)))
    assert len(fake.log) == 7 * 3 + 1 and steps[-1] == (24, 24)
    failed = [run for run in store.runs().values() if run.state is RunState.FAILED]
    assert len(failed) == 1 and failed[0].message == f"{type(error).__name__}: {error}"
    (row,) = [row for row in study_rows(study, store) if row.state is RunState.FAILED]
    assert row.cells == (None, None) and row.recovery is None
    same = Fake()
    run_study(study, store, same)
    assert same.log == []
    retried = Fake()
    run_study(study, store, retried, failed=FailedRuns.RETRY)
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
