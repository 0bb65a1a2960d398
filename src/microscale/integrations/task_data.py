"""The data of our lm-eval definitions (tasks/*.yaml): local documents as lm-eval takes them.

The definitions also work in lm-eval's own command line, without microscale's model loading:
``lm_eval --include_path $(microscale tasks --path) --tasks piqa --metadata '{"task_data": "DIR"}' …``
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from microscale.errors import DependencyError, TaskError
from microscale.evaluation.task_documents import TaskDocuments, load_documents

DEFINITIONS = Path(__file__).with_name("tasks")
"""The folder of the definitions."""


def documents(*, task: str, task_data: str | None = None, **others: Any) -> dict[str, Any]:
    """Return the splits ``test`` and ``fewshot`` of a task; lm-eval calls this with the definition's keywords.

    Raises:
        TaskError: no data folder, or its files are absent or damaged.
        DependencyError: datasets is not installed.
    """
    del others  # lm-eval hands over the definition's whole metadata
    if task_data is None:
        raise TaskError(f"task {task}: the folder of its data is missing; give it as task_data")
    return splits_of(load_documents(task, Path(task_data)))


def splits_of(found: TaskDocuments) -> dict[str, Any]:
    """Return documents as data sets by split; rows for examples are the test's own where there are no others."""
    try:
        from datasets import Dataset
    except ImportError:
        raise DependencyError("datasets", extra="eval", purpose="running evaluation tasks") from None
    return {"test": Dataset.from_list(found.test), "fewshot": Dataset.from_list(found.fewshot or found.test)}
