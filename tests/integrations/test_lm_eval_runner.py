"""What tasks are asked for is checked before a model is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from microscale.errors import TaskError
from microscale.integrations.lm_eval_runner import CodeExecution, TaskRequest, check_request


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (TaskRequest(tasks=()), "no task was asked for"),
        (TaskRequest(tasks=("pika",)), "pika"),
        (TaskRequest(tasks=("piqa",), limit=0), "limit"),
        (TaskRequest(tasks=("piqa",), num_fewshot=-1), "few-shot"),
        (TaskRequest(tasks=("piqa",), batch=0), "batch"),
        (TaskRequest(tasks=("humaneval",)), "code"),
    ],
)
def test_what_cannot_run_is_refused(request_: TaskRequest, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        check_request(request_)


def test_what_can_run_is_not(tmp_path: Path) -> None:
    wanted = TaskRequest(tasks=("piqa", "humaneval"), limit=1, num_fewshot=0, code_execution=CodeExecution.ALLOWED)
    check_request(wanted)
    check_request(dataclasses.replace(wanted, tasks=("lambada",), limit=None))
