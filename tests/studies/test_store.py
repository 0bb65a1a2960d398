"""The results file: what is kept, merged, locked and refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from fake_studies import Fake, Running, stop_at
from microscale.errors import StudyError
from microscale.studies.file import Study
from microscale.studies.results import study_rows
from microscale.studies.run import run_study
from microscale.studies.store import StudyStore


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
