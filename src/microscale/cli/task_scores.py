"""The task half of ``microscale eval``, and ``microscale tasks``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from microscale.cli.output import Column, JsonOption, command, console, print_json, print_table, progress_bar
from microscale.errors import TaskError
from microscale.evaluation import GROUPS, TASKS, TaskScore
from microscale.evaluation.task_files import find_file
from microscale.nn import cached_weights, prepare_for_inference

TasksOption = Annotated[
    str | None,
    typer.Option("--tasks", help="Tasks to run through lm-eval, with commas between them; see `microscale tasks`."),
]
TaskDataOption = Annotated[
    Path | None, typer.Option("--task-data", help="Folder with the tasks' files; without it they come from the hub.")
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Only the first N documents of each task (or part of a group)."),
]
FewshotOption = Annotated[
    int | None, typer.Option("--num-fewshot", min=0, help="Answered examples in each prompt (default: the task's).")
]
CodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution", help="Run programs that the model writes (HumanEval). They have your rights."
    ),
]


def make_request(
    tasks: str,
    *,
    task_data: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    batch: int | None,
    seed: int,
    allow_code_execution: bool,
) -> Any:
    """Return the request of a command line, checked before a model is loaded.

    Raises:
        TaskError: an unknown task, one that needs a permission, or one whose local data is absent.
    """
    from microscale.integrations.lm_eval_runner import CodeExecution, TaskRequest, check_request

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    allowed = CodeExecution.ALLOWED if allow_code_execution else CodeExecution.FORBIDDEN
    request = TaskRequest(
        tasks=names,
        task_data=task_data,
        limit=limit,
        num_fewshot=num_fewshot,
        seed=seed,
        code_execution=allowed,
        **({} if batch is None else {"batch": batch}),
    )
    check_request(request)
    return request


def score_tasks(model: Any, tokenizer: Any, request: Any) -> list[TaskScore]:
    """Run tasks on a loaded model whose packed weights run on the kernels, with a progress bar."""
    from microscale.integrations.lm_eval_runner import run_tasks

    prepare_for_inference(model)
    with progress_bar("tasks") as advance, cached_weights(model):
        return run_tasks(model, tokenizer, request, lambda done, total: advance(done, total, "requests"))


def task_scores_json(scores: Sequence[TaskScore]) -> list[dict[str, Any]]:
    """Return scores as JSON values."""
    return [dataclasses.asdict(score) for score in scores]


def print_task_scores(scores: Sequence[TaskScore], *, limit: int | None) -> None:
    """Print the scores of whole tasks; the parts of a group are in the JSON."""
    columns = [
        Column(title="task"),
        Column(title="metric"),
        Column(title="value", is_number=True),
        Column(title="± stderr", is_number=True),
        Column(title="chance", is_number=True, drop=2),
        Column(title="documents", is_number=True, drop=1),
        Column(title="shots", is_number=True, drop=3),
    ]
    rows = [
        (
            score.task,
            score.metric + (" *" if score.is_main else ""),
            f"{score.value:.4f}",
            "" if score.stderr is None else f"{score.stderr:.4f}",
            "" if score.chance is None else f"{score.chance:.3f}",
            str(score.samples),
            str(score.num_fewshot),
        )
        for score in scores
        if score.group is None
    ]
    title = "Tasks (* the main metric" + ("" if limit is None else f"; only the first {limit} documents of each") + ")"
    print_table(title, columns, rows)
    for note in dict.fromkeys(f"{score.task}: {score.note}" for score in scores if score.note):
        console.print(note, markup=False)


@command
def tasks(
    task_data: TaskDataOption = None,
    path: Annotated[bool, typer.Option("--path", help="Print the folder of the lm-eval definitions alone.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the evaluation tasks: main metric, chance level, where the data comes from, whether local files do.

    Example: `microscale tasks --task-data DIR` also says what is in a folder
    """
    from microscale.integrations.task_data import DEFINITIONS

    if path:
        console.print(str(DEFINITIONS), markup=False, soft_wrap=True)
        return
    found = {name: _local_file(name, task_data) for name in TASKS}
    if as_json:
        print_json([dataclasses.asdict(record) | {"found": found[name]} for name, record in TASKS.items()])
        return
    columns = [Column(title=title) for title in ("task", "about", "metric")]
    columns += [Column(title="chance", is_number=True, drop=1), Column(title="hub", drop=2), Column(title="local file")]
    rows = [
        (
            name + (" (group)" if name in GROUPS else ""),
            record.about,
            record.metric,
            "" if record.chance is None else f"{record.chance:.3f}",
            record.hub_task,
            _local_words(record.files, found[name], task_data),
        )
        for name, record in TASKS.items()
    ]
    rows.append(("text:FILE", "any text: perplexity by word and byte", "word_perplexity", "", "", "FILE"))
    print_table("Evaluation tasks", columns, rows)


def _local_file(name: str, task_data: Path | None) -> str | None:
    if task_data is None or not TASKS[name].files:
        return None
    try:
        return str(find_file(task_data, name, TASKS[name].files))
    except TaskError:
        if not task_data.is_dir():
            raise
        return None


def _local_words(files: Sequence[str], found: str | None, task_data: Path | None) -> str:
    if not files:
        return "hub only"
    if task_data is None:
        return files[-1]
    return found or f"missing: {files[-1]}"
