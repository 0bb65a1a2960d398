"""Results of a study in one SQLite file: a queue of runs with states, their scores, and merging of files.

Every change is committed at once, so an interrupt or a crash loses nothing that was finished. A run that was
``running`` when the process ended is ``waiting`` again for the next worker. Only one process may work on a file at a
time, which a lock keeps; reading needs none.
"""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from microscale.errors import StudyError
from microscale.planning.executed import Executed

VERSION = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS runs (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, format TEXT NOT NULL, method TEXT NOT NULL, state TEXT NOT NULL,
    message TEXT NOT NULL DEFAULT '', bits_per_weight REAL, num_bytes INTEGER, quantize_seconds REAL,
    peak_bytes INTEGER, machine TEXT NOT NULL DEFAULT '', finished TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE IF NOT EXISTS scores (
    run TEXT NOT NULL REFERENCES runs(key), task_key TEXT NOT NULL, metric TEXT NOT NULL, value REAL,
    stderr REAL, samples INTEGER NOT NULL, is_main INTEGER NOT NULL, is_higher_better INTEGER NOT NULL,
    seconds REAL NOT NULL, PRIMARY KEY (run, task_key, metric)
) STRICT;
"""

_EXECUTIONS = """
CREATE TABLE IF NOT EXISTS executions (
    run TEXT NOT NULL REFERENCES runs(key), task_key TEXT NOT NULL, operation TEXT NOT NULL, backend TEXT NOT NULL,
    calls INTEGER NOT NULL, PRIMARY KEY (run, task_key, operation, backend)
) STRICT
"""
"""What ran for each score; files of before it was counted get this table when work goes on."""


class RunState(Enum):
    """Where a run is in the queue."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """One run as it stands in the file; NaN where a number is not known yet is None."""

    key: str
    model: str
    format: str
    method: str
    state: RunState
    message: str = ""
    bits_per_weight: float | None = None
    num_bytes: int | None = None
    quantize_seconds: float | None = None
    peak_bytes: int | None = None
    machine: str = ""
    finished: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyScore:
    """One metric of one task for one run; ``value`` is None where it was NaN, which SQLite cannot hold.

    Who scores leaves ``task_key`` and ``seconds`` to who stores it.
    """

    task_key: str = ""
    metric: str
    value: float | None
    stderr: float | None = None
    samples: int
    is_main: bool = True
    is_higher_better: bool
    seconds: float = 0.0


_RUN_COLUMNS = tuple(one.name for one in dataclasses.fields(StoredRun))
_FACTS = tuple(name for name in _RUN_COLUMNS if name not in ("key", "model", "format", "method", "state"))
_SCORE_COLUMNS = tuple(one.name for one in dataclasses.fields(StudyScore))


class StudyStore:
    """The results file of a study."""

    def __init__(self, path: Path) -> None:
        """Open a file, or make it.

        Raises:
            StudyError: it is no results file, of another version, or cannot be written.
        """
        self.path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            has_tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0
            if version not in (0, VERSION) or (version == 0 and has_tables):
                raise StudyError(f"{path} is not a results file of version {VERSION}; name another with --results")
            if not has_tables:  # a file that is only read stays as it is, byte for byte
                self._db.executescript(_TABLES)
                self._db.execute(_EXECUTIONS)
                self._db.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.Error as error:
            raise StudyError(f"results file {path} cannot be used: {error}") from None

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def working(self) -> Generator[None, None, None]:
        """Hold the file for one worker; runs that an earlier one left unfinished are waiting again.

        Raises:
            StudyError: another process works on it.
        """
        with self.path.open("rb") as handle:  # flock does not meet SQLite's own locks, which are of the other kind
            try:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:
                pass  # no such lock on this system
            except OSError:
                raise StudyError(f"another process works on {self.path}; wait for it or use --report-only") from None
            self._write(_EXECUTIONS)
            self._write("UPDATE runs SET state = 'waiting' WHERE state = 'running'")
            yield

    def add(self, key: str, *, model: str, format: str, method: str) -> None:
        """Enter a run unless it is there."""
        self._write(
            "INSERT OR IGNORE INTO runs (key, model, format, method, state) VALUES (?, ?, ?, ?, 'waiting')",
            (key, model, format, method),
        )

    def update(self, key: str, state: RunState, **fields: Any) -> None:
        """Set the state of a run, and what became known."""
        names = ["state", *fields]
        values = [state.value, *fields.values(), key]
        self._write(f"UPDATE runs SET {', '.join(f'{name} = ?' for name in names)} WHERE key = ?", values)

    def add_scores(self, key: str, scores: Sequence[StudyScore], executed: Executed) -> None:
        """Store the scores of one task and what ran for them, all or none."""
        task_key = scores[0].task_key if scores else ""
        ran = [
            (key, task_key, operation, backend, count)
            for operation, calls in executed.items()
            for backend, count in calls.items()
        ]
        rows = [(key, *dataclasses.astuple(score)) for score in scores]
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            self._db.executemany("INSERT OR REPLACE INTO executions VALUES (?, ?, ?, ?, ?)", ran)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise StudyError(f"results file {self.path} cannot be written: {error}") from None

    def runs(self) -> dict[str, StoredRun]:
        """Return all runs by key."""
        columns = ", ".join(_RUN_COLUMNS)
        found = (StoredRun(**dict(zip(_RUN_COLUMNS, row, strict=True))) for row in self._read(columns, "runs"))
        return {run.key: dataclasses.replace(run, state=RunState(run.state)) for run in found}

    def scores(self) -> dict[str, dict[str, list[StudyScore]]]:
        """Return all scores by run and task key, main metrics first."""
        found: dict[str, dict[str, list[StudyScore]]] = {}
        columns = ", ".join(("run", *_SCORE_COLUMNS))
        for run, *row in self._read(columns, "scores ORDER BY is_main DESC, metric"):
            values = dict(zip(_SCORE_COLUMNS, row, strict=True))
            values |= {name: bool(values[name]) for name in ("is_main", "is_higher_better")}
            found.setdefault(run, {}).setdefault(values["task_key"], []).append(StudyScore(**values))
        return found

    def executed(self) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
        """Return what ran, by run and task key; nothing for scores of before it was counted."""
        found: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
        if not self._read("name", "sqlite_master WHERE name = 'executions'"):
            return found
        columns = "run, task_key, operation, backend, calls"
        for run, task, operation, backend, calls in self._read(columns, "executions ORDER BY operation, backend"):
            found.setdefault(run, {}).setdefault(task, {}).setdefault(operation, {})[backend] = calls
        return found

    def merge(self, other: Path) -> int:
        """Take the finished runs of another file, and their scores; returns how many runs were new or renewed.

        A run that is done here stays, and gets the scores of tasks that it lacks.

        Raises:
            StudyError: the other file does not exist or is no results file.
        """
        if not other.is_file():
            raise StudyError(f"{other} is not a file; give the results file of a study")
        theirs = StudyStore(other)
        try:
            runs, scores, executed = theirs.runs(), theirs.scores(), theirs.executed()
        finally:
            theirs.close()
        self._write(_EXECUTIONS)
        mine, known = self.runs(), self.scores()
        count = 0
        for key, run in runs.items():
            wanted = {task: rows for task, rows in scores.get(key, {}).items() if task not in known.get(key, {})}
            is_better = run.state is RunState.DONE and (key not in mine or mine[key].state is not RunState.DONE)
            if not wanted and not is_better:
                continue
            count += 1
            self.add(key, model=run.model, format=run.format, method=run.method)
            if is_better:
                facts = {name: getattr(run, name) for name in _FACTS}
                self.update(key, run.state, **facts)
            for task, rows in wanted.items():
                self.add_scores(key, rows, executed.get(key, {}).get(task, {}))
        return count

    def _read(self, columns: str, source: str) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(f"SELECT {columns} FROM {source}").fetchall()
        except sqlite3.Error as error:
            raise StudyError(f"results file {self.path} cannot be read: {error}") from None

    def _write(self, statement: str, values: Sequence[Any] = ()) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise StudyError(f"results file {self.path} cannot be written: {error}") from None
