"""``microscale tasks``: the evaluation tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from microscale.cli.output import Column, JsonOption, console, print_json, print_table
from microscale.cli.parameters import job_command
from microscale.jobs.small_options import TasksOptions

if TYPE_CHECKING:
    from microscale.jobs.tasks import FoundTask


@job_command(TasksOptions)
def tasks(
    options: TasksOptions,
    path: Annotated[bool, typer.Option("--path", help="Print the folder of the lm-eval definitions alone.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the evaluation tasks: main metric, chance level, where the data comes from, whether local files do.

    Example: `microscale tasks --task-data DIR` also says what is in a folder
    """
    from microscale.evaluation.tasks import GROUPS
    from microscale.integrations.task_data import DEFINITIONS
    from microscale.jobs.tasks import tasks as tasks_job

    if path:
        console.print(str(DEFINITIONS), markup=False, soft_wrap=True)
        return
    found = tasks_job(options)
    if as_json:
        print_json(found)
        return
    columns = [Column(title=title) for title in ("task", "about", "metric")]
    columns += [Column(title="chance", is_number=True, drop=1), Column(title="hub", drop=2), Column(title="local file")]
    rows = [
        (
            one.name + (" (group)" if one.name in GROUPS else ""),
            one.record.about,
            one.record.metric,
            "" if one.record.chance is None else f"{one.record.chance:.3f}",
            one.record.hub_task,
            _local_words(one, options),
        )
        for one in found
    ]
    rows.append(("text:FILE", "any text: perplexity by word and byte", "word_perplexity", "", "", "FILE"))
    print_table("Evaluation tasks", columns, rows)


def _local_words(task: FoundTask, options: TasksOptions) -> str:
    files = task.record.files
    if not files:
        return "hub only"
    if options.task_data is None:
        return files[-1]
    return task.found or f"missing: {files[-1]}"
