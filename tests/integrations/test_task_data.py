"""Documents as lm-eval takes them: splits of data sets, and errors that say what is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from microscale.errors import DependencyError, TaskError
from microscale.evaluation.task_documents import TaskDocuments
from microscale.integrations.task_data import DEFINITIONS, documents, splits_of
from task_data import ROWS, write_task_data


def test_rows_for_examples_are_the_tests_own_where_there_are_no_others() -> None:
    pytest.importorskip("datasets")
    test, shots = [{"a": 1}, {"a": 2}], [{"a": 3}]
    own = splits_of(TaskDocuments(test=test, source="s"))
    assert own["test"].to_list() == own["fewshot"].to_list() == test
    assert splits_of(TaskDocuments(test=test, source="s", fewshot=shots))["fewshot"].to_list() == shots


def test_the_folder_comes_with_the_metadata(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_task_data(tmp_path)
    found = documents(task="piqa", task_data=str(tmp_path), version=1)
    assert found["test"].to_list() == ROWS["piqa"]
    with pytest.raises(TaskError, match="task piqa: the folder of its data is missing; give it as task_data"):
        documents(task="piqa")


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r"running evaluation tasks needs datasets.*microscale\[eval\]"):
        splits_of(TaskDocuments(test=[], source="s"))


def test_every_definition_names_our_function() -> None:
    texts = [path.read_text() for path in DEFINITIONS.glob("*.yaml")]
    assert texts and sum("task_data" in text for text in texts) > 5
