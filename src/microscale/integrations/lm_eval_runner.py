"""Run evaluation tasks on a loaded model through lm-eval: definitions of ours with local data, or lm-eval's own.

lm-eval is loaded when a task runs, and writes neither log lines nor bars of its own meanwhile.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import os
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

from microscale.errors import DependencyError, MicroscaleError, TaskError
from microscale.evaluation.task_documents import load_documents, task_parts
from microscale.evaluation.tasks import GROUPS, TEXT_PREFIX, TaskRecord, TaskScore, find_task
from microscale.integrations.hub import offline_where_unreachable
from microscale.integrations.loading import LIBRARY_ERRORS
from microscale.integrations.task_data import DEFINITIONS, splits_of

BOOTSTRAPS = 1000
"""Samples drawn for the standard error of metrics that have no formula for it (LAMBADA's perplexity)."""
HUB = "hub"


class CodeExecution(Enum):
    """Whether programs that the model writes may be run."""

    FORBIDDEN = "forbidden"
    ALLOWED = "allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """Which tasks to run and how; ``limit`` counts documents, in each part of a group."""

    tasks: tuple[str, ...]
    task_data: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch: int = 16
    seed: int = 0
    code_execution: CodeExecution = CodeExecution.FORBIDDEN


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """One asked task: its record, what lm-eval runs, and where its data came from."""

    name: str
    record: TaskRecord
    runnable: Any
    source: str
    note: str


def run_tasks(
    model: Any, tokenizer: Any, request: TaskRequest, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[TaskScore]:
    """Score a loaded transformers model on tasks; the main metric of each task comes first.

    Special values: a model with NaN in its logits chooses nothing, its perplexities are NaN.

    Raises:
        TaskError: unknown task, absent or damaged data, no network, or a task that needs code execution.
        DependencyError: lm-eval is not installed.
    """
    check_request(request)
    _require_lm_eval()
    import lm_eval
    from lm_eval.tasks import TaskManager

    from microscale.integrations.lm_eval_model import EvaluatedModel

    scores: list[TaskScore] = []
    with _quiet():
        items = [_build(name, request) for name in dict.fromkeys(request.tasks)]
        subject = EvaluatedModel(model, tokenizer, batch=request.batch, progress=progress)
        for item in items:
            _settle(item, subject, request)
            try:
                found = cast(Any, lm_eval.simple_evaluate)(
                    subject,
                    tasks=[item.runnable],
                    num_fewshot=request.num_fewshot,
                    limit=request.limit,
                    log_samples=False,
                    bootstrap_iters=BOOTSTRAPS,
                    task_manager=TaskManager(include_defaults=False),
                    random_seed=request.seed,
                    numpy_random_seed=request.seed,
                    torch_random_seed=request.seed,
                    fewshot_random_seed=request.seed,
                    confirm_run_unsafe_code=request.code_execution is CodeExecution.ALLOWED,
                )
            except MicroscaleError:
                raise
            except (*LIBRARY_ERRORS, AssertionError) as error:
                raise TaskError(f"task {item.name} failed: {error or type(error).__name__}") from error
            scores += _scores(item, found)
    return scores


def check_request(request: TaskRequest) -> None:
    """Refuse what cannot run, before a model is loaded.

    Raises:
        TaskError: no task, an unknown one, numbers below 1, or a task that runs code without permission.
    """
    if not request.tasks:
        raise TaskError("no task was asked for; `microscale tasks` lists them")
    for word, number, least in (
        ("limit", request.limit, 1),
        ("number of few-shot examples", request.num_fewshot, 0),
        ("batch", request.batch, 1),
    ):
        if number is not None and number < least:
            raise TaskError(f"the {word} must be at least {least}, got {number}")
    for name in request.tasks:
        record = find_task(name)
        if record.runs_code and request.code_execution is CodeExecution.FORBIDDEN:
            raise TaskError(
                f"task {name} runs programs that the model writes, with your rights; where that is safe (a container),"
                " give --allow-code-execution"
            )
        if name.startswith(TEXT_PREFIX) and request.task_data is None:
            raise TaskError(f"task {name} reads a local text; give the folder that holds it as --task-data")


def _require_lm_eval() -> None:
    try:
        import lm_eval
    except ImportError:
        raise DependencyError("lm-eval", extra="eval", purpose="running evaluation tasks") from None
    del lm_eval


def _build(name: str, request: TaskRequest) -> _Item:
    record = find_task(name)
    folder = request.task_data
    if folder is None or not record.files:
        return _Item(name=name, record=record, runnable=_hub_task(name, record), source=HUB, note="")
    if name not in GROUPS:
        task, source, note = _local_task(name, record, folder, request)
        return _Item(name=name, record=record, runnable=task, source=source, note=note)
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig, GroupConfig

    sizes = [AggMetricConfig(metric=record.metric, filter_list=["none"], weight_by_size=True)]
    group = Group.from_config(GroupConfig(group=name, task=[], aggregate_metric_list=cast(Any, sizes)))
    source = ""
    for part in task_parts(name, folder):
        task, source, _ = _local_task(f"{name}_{part}", record, folder, request)
        group.add(task)
    return _Item(name=name, record=record, runnable=group, source=source, note="")


def _local_task(name: str, record: TaskRecord, folder: Path, request: TaskRequest) -> tuple[Any, str, str]:
    """Return a task with local documents, where they came from, and what is special about them."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    found = load_documents(name, folder)
    pool = len(found.fewshot) or len(found.test) - 1
    shots = record.default_fewshot if request.num_fewshot is None else request.num_fewshot
    if shots > pool:
        raise TaskError(f"task {name}: {shots} few-shot examples were asked for, {found.source} gives {pool}")
    definition = "text" if name.startswith(TEXT_PREFIX) else record.name
    config: dict[str, Any] = load_yaml(DEFINITIONS / f"{definition}.yaml")
    config |= {"task": name, "custom_dataset": lambda **_: splits_of(found), "dataset_kwargs": {}}
    if record.name == "mmlu":
        subject = name.removeprefix("mmlu_").replace("_", " ")
        config["description"] = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return ConfigurableTask(config=cast(Any, config)), found.source, found.note


def _hub_task(name: str, record: TaskRecord) -> Any:
    """Return lm-eval's own task, whose data comes from the hub (or its cache).

    Raises:
        TaskError: the hub cannot be reached, or the data set cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    part = name.removeprefix(record.name)
    try:
        with offline_where_unreachable():
            loaded = TaskManager().load([record.hub_task + part])
    except ImportError as error:
        raise TaskError(f"task {name} needs a library that is not installed: {error}") from error
    except (*LIBRARY_ERRORS, AssertionError) as error:
        local = f"; or give its file ({' or '.join(record.files)}) with --task-data" if record.files else ""
        raise TaskError(
            f"task {name} could not be loaded from the hub: {str(error) or type(error).__name__}\n"
            f"check the network and HF_HUB_OFFLINE{local}"
        ) from error
    groups = list(loaded.get("groups", {}).values())
    return groups[0] if groups else next(iter(loaded["tasks"].values()))


def _settle(item: _Item, subject: Any, request: TaskRequest) -> None:
    """Leave room for the prompt where a task wants to generate more tokens than the model has positions."""
    tasks = item.runnable.get_all_tasks() if hasattr(item.runnable, "get_all_tasks") else [item.runnable]
    for task in cast("Iterable[Any]", tasks):
        if task.get_config("output_type") == "generate_until":
            wanted = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", subject.max_gen_toks)
            room = {"max_gen_toks": min(wanted, subject.max_length // 2)}
            task.set_config(key="generation_kwargs", value=room, update=True)


def _scores(item: _Item, found: dict[str, Any]) -> list[TaskScore]:
    """Translate lm-eval's results; for a group its own row first, then its parts."""
    results = cast("dict[str, dict[str, Any]]", found["results"])
    groups = cast("dict[str, dict[str, Any]]", found.get("groups", {}))
    scores: list[TaskScore] = []
    for name, metrics in {**groups, **results}.items():
        is_whole = name in groups or not groups
        better = found["higher_is_better"].get(name, {})
        samples = found["n-samples"].get(name) or {}
        parts = [count["effective"] for count in found["n-samples"].values()]
        for key, value in metrics.items():
            metric, comma, variant = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            label = metric if variant == "none" else key
            stderr = metrics.get(f"{metric}_stderr,{variant}")
            is_main = is_whole and label == item.record.metric
            scores.append(
                TaskScore(
                    task=item.name if is_whole else name,
                    metric=label,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                    samples=int(samples.get("effective", sum(parts))),
                    num_fewshot=int(found["n-shot"].get(name, 0) or 0),
                    is_main=is_main,
                    is_higher_better=bool(better.get(metric, "perplexity" not in metric and metric != "bits_per_byte")),
                    chance=item.record.chance if metric.startswith(("acc", "exact_match", "pass")) else None,
                    source=item.source,
                    note=item.note,
                    group=None if is_whole else item.name,
                )
            )
    return sorted(scores, key=lambda score: (score.group is not None, not score.is_main))


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Keep lm-eval and datasets silent: no log lines, bars, prints or complaints of git, and no pool of processes for a
    bootstrap.
    """
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    start = cast(Any, tqdm.__init__)
    variable = "DISABLE_MULTIPROC"
    before = os.environ.get(variable)
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    find_commit = getattr(evaluator, "get_git_commit_hash", None)

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **(kwargs | {"disable": True}))

    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        cast(Any, tqdm).__init__ = silent
        os.environ[variable] = "1"
        if find_commit is not None:  # it asks git about the folder that we run in, and git complains where it is none
            evaluator.get_git_commit_hash = lambda: None
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        cast(Any, tqdm).__init__ = start
        if find_commit is not None:
            evaluator.get_git_commit_hash = find_commit
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
