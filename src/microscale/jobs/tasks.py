"""List the evaluation tasks, and which of them local files have the data of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microscale.errors import TaskError
from microscale.evaluation.task_files import find_file
from microscale.evaluation.tasks import TASKS, TaskRecord
from microscale.jobs.reporting import SILENT, Reporter
from microscale.jobs.small_options import TasksOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTask:
    """A task under its name; ``found`` is its local file, None where there is none or no folder was given."""

    name: str
    record: TaskRecord
    found: str | None

    def as_json(self) -> dict[str, Any]:
        """Return the record of the task, and its file."""
        return dataclasses.asdict(self.record) | {"found": self.found}


def tasks(options: TasksOptions, reporter: Reporter = SILENT) -> tuple[FoundTask, ...]:
    """List the evaluation tasks: main metric, chance level, where the data comes from, whether local files do.

    Raises:
        TaskError: the folder does not exist.
    """
    del reporter  # nothing takes long
    return tuple(
        FoundTask(name=name, record=record, found=_local_file(name, options.task_data))
        for name, record in TASKS.items()
    )


def _local_file(name: str, task_data: Path | None) -> str | None:
    if task_data is None or not TASKS[name].files:
        return None
    try:
        return str(find_file(task_data, name, TASKS[name].files))
    except TaskError:
        if not task_data.is_dir():
            raise
        return None
