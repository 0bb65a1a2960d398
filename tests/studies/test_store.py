"""The results file: what is kept, merged, locked and refused."""

from __future__ import annotations

import dataclasses
import math
import sqlite3
from pathlib import Path

import pytest

from fake_studies import Fake, Running, stop_at
from microscale.errors import StudyError
from microscale.studies.file import Study
from microscale.studies.results import study_rows
from microscale.studies.run import run_study
from microscale.studies.store import RunState, StoredRun, StudyScore, StudyStore


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


def one_score(task: str, value: float | None = 1.5) -> StudyScore:
    return StudyScore(
        task_key=task,
        metric="acc",
        value=value,
        stderr=None,
        samples=7,
        is_main=True,
        is_higher_better=False,
        seconds=0.25,
    )


def test_runs_and_scores_come_back_as_they_were(store: StudyStore) -> None:
    store.add("k", model="m", format="f", method="r")
    store.add("k", model="other", format="other", method="other")  # it is there already
    assert store.runs() == {"k": StoredRun(key="k", model="m", format="f", method="r", state=RunState.WAITING)}
    store.update("k", RunState.DONE, bits_per_weight=4.25, num_bytes=2**40, message="ü")
    run = StudyStore(store.path).runs()["k"]
    assert (run.state, run.bits_per_weight, run.num_bytes, run.message) == (RunState.DONE, 4.25, 2**40, "ü")
    side = dataclasses.replace(one_score("t", None), metric="a", is_main=False)
    store.add_scores("k", [side, one_score("t", math.inf)], {"linear": {"x": 2, "y": 3}})
    assert store.scores() == {"k": {"t": [one_score("t", math.inf), side]}}  # the main metric first
    assert store.executed() == {"k": {"t": {"linear": {"x": 2, "y": 3}}}}


def test_a_worker_finds_what_another_left_running(store: StudyStore) -> None:
    for key, state in (("a", RunState.RUNNING), ("b", RunState.FAILED), ("c", RunState.DONE)):
        store.add(key, model="m", format="f", method="r")
        store.update(key, state)
    with store.working():
        pass
    states = {key: run.state for key, run in store.runs().items()}
    assert states == {"a": RunState.WAITING, "b": RunState.FAILED, "c": RunState.DONE}


def test_a_closed_file_is_an_error_of_ours(store: StudyStore) -> None:
    store.close()
    with pytest.raises(StudyError, match=r"results file .*s\.sqlite cannot be read"):
        store.runs()
    with pytest.raises(StudyError, match=r"results file .*s\.sqlite cannot be written"):
        store.add("k", model="m", format="f", method="r")
    with pytest.raises(StudyError, match="cannot be written"):
        store.add_scores("k", [one_score("t")], {})


def test_reading_leaves_the_file_as_it_is(store: StudyStore) -> None:
    store.add("k", model="m", format="f", method="r")
    store.close()
    before = store.path.read_bytes()
    again = StudyStore(store.path)
    assert list(again.runs()) == ["k"] and again.scores() == again.executed() == {}
    again.close()
    assert store.path.read_bytes() == before
