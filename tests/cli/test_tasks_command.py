"""`microscale tasks`: the list, with what local files have."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import fail, succeed
from task_data import write_task_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    write_task_data(root / "tasks")
    return root


def test_the_list_of_tasks(folder: Path) -> None:
    found = succeed("tasks", "--json", "--task-data", folder / "tasks").json
    assert len(found) >= 15 and sum(one["found"] is not None for one in found) >= 13
    assert "blimp (group)" in succeed("tasks").stdout
    assert Path(succeed("tasks", "--path").stdout.strip()).is_dir()
    assert "is not a folder" in fail("tasks", "--task-data", folder / "absent")


def test_a_missing_file_is_named_in_the_table(folder: Path, tmp_path: Path) -> None:
    assert "missing: " not in succeed("tasks").stdout
    assert "missing: " in succeed("tasks", "--task-data", tmp_path).stdout
    assert str(folder / "tasks") in succeed("tasks", "--task-data", folder / "tasks").stdout
