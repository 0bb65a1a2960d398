"""The job ``tasks`` in Python."""

from __future__ import annotations

from pathlib import Path

import pytest

import microscale
from command_line import succeed
from microscale.errors import TaskError
from microscale.evaluation.tasks import TASKS
from microscale.jobs.printing import json_value
from task_data import write_task_data


def test_tasks_and_their_files(tmp_path: Path) -> None:
    write_task_data(tmp_path / "tasks")
    found = microscale.tasks(task_data=tmp_path / "tasks")
    assert [one.name for one in found] == list(TASKS)
    assert all(one.found is None or Path(one.found).exists() for one in found)
    assert sum(one.found is not None for one in found) >= 13
    shown = succeed("tasks", "--json", "--task-data", tmp_path / "tasks").json
    assert [json_value(one)["found"] for one in found] == [one["found"] for one in shown]
    assert all(one.found is None for one in microscale.tasks())


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="is not a folder"):
        microscale.tasks(task_data=tmp_path / "absent")
