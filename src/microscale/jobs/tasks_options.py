"""The options of ``tasks``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from microscale.jobs.option import Option, Options

TaskData = Annotated[Path | None, Option(help="Folder with the tasks' files; without it they come from the hub.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksOptions(Options):
    """Where the files of tasks are looked for."""

    task_data: TaskData = None
