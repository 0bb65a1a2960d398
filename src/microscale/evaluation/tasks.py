"""The evaluation tasks that are known by name: what each asks, how it is scored, and where its data may lie.

The definitions that lm-eval runs are YAML files in integrations/tasks; this table says what a reader of a result
needs (main metric, chance level) and which local files hold the data, so that a task runs without a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from microscale.errors import TaskError, nearest

TEXT_PREFIX = "text:"
"""``text:FILE`` is the task that scores a text file: perplexity by word and by byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecord:
    """One task.

    ``metric`` is the main one of those that are reported, ``chance`` its value for blind guessing (None: it has no such
    value). ``hub_task`` is lm-eval's own name, which loads from the hub. ``files`` are the places below the data folder
    where local data is looked for, most wanted first; empty: hub only.
    """

    name: str
    about: str
    metric: str
    hub_task: str
    chance: float | None = None
    files: tuple[str, ...] = ()
    default_fewshot: int = 0
    runs_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of one task (or of a part of it, where ``group`` names the whole).

    ``stderr`` is None where the metric has no estimate. ``source`` is the local file, or ``hub``.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    num_fewshot: int
    is_main: bool
    is_higher_better: bool
    chance: float | None
    source: str
    note: str = ""
    group: str | None = None


def _form(name: str) -> str:
    return f"instruction_form/{name}.json"


def _task(name: str, about: str, metric: str, chance: float | None, *files: str, **rest: Any) -> TaskRecord:
    """Return a task whose name is lm-eval's own, if nothing else is said."""
    words: dict[str, Any] = {"hub_task": name} | rest
    return TaskRecord(name=name, about=about, metric=metric, chance=chance, files=files, **words)


TASKS: dict[str, TaskRecord] = {
    record.name: record
    for record in (
        _task(
            "lambada",
            "the last word of a passage",
            "acc",
            0.0,
            "lambada.jsonl",
            "lambada_test.jsonl",
            hub_task="lambada_openai",
        ),
        _task(
            "hellaswag",
            "the ending of an everyday scene, of 4",
            "acc_norm",
            0.25,
            "hellaswag.jsonl",
            "hellaswag/hellaswag_val.jsonl",
            "hellaswag/hellaswag_val_full.txt",
        ),
        _task("piqa", "which of 2 ways reaches a physical goal", "acc", 0.5, "piqa.jsonl", "piqa/valid.jsonl"),
        _task("arc_easy", "school science, easy part, mostly of 4", "acc", 0.25, "arc_easy.jsonl", _form("ARC-Easy")),
        _task(
            "arc_challenge",
            "school science, hard part, mostly of 4",
            "acc_norm",
            0.25,
            "arc_challenge.jsonl",
            _form("ARC-Challenge"),
        ),
        _task("winogrande", "whom a pronoun means, of 2", "acc", 0.5, "winogrande.jsonl", _form("winogrande")),
        _task("boolq", "yes or no (with the passage where the file has it)", "acc", 0.5, "boolq.jsonl", _form("boolq")),
        _task(
            "openbookqa", "elementary science facts, of 4", "acc_norm", 0.25, "openbookqa.jsonl", _form("openbookqa")
        ),
        _task(
            "siqa", "social situations, of 3", "acc", 1 / 3, "siqa.jsonl", _form("social_i_qa"), hub_task="social_iqa"
        ),
        _task("mmlu", "57 subjects of school and university, of 4", "acc", 0.25, "mmlu", "mmlu.zip"),
        _task("blimp", "which of 2 sentences is grammatical, 67 phenomena", "acc", 0.5, "BLiMP.zip", "BLiMP", "blimp"),
        _task(
            "gsm8k",
            "school mathematics in words, generated",
            "exact_match,flexible-extract",
            0.0,
            "gsm8k.jsonl",
            "gsm8k/test.jsonl",
            default_fewshot=5,
        ),
        _task(
            "humaneval",
            "Python functions, generated and executed",
            "pass_at_1",
            0.0,
            "humaneval.jsonl",
            "humaneval/HumanEval.jsonl",
            runs_code=True,
        ),
        _task("math500", "competition mathematics, generated", "exact_match", 0.0, hub_task="minerva_math500"),
        _task("aime24", "AIME of 2024, generated", "exact_match", 0.0),
        _task("aime25", "AIME of 2025, generated", "exact_match", 0.0),
        _task(
            "wikitext",
            "WikiText-2, perplexity by word and byte",
            "word_perplexity",
            None,
            "wikitext2_test.txt",
            "wikitext-2-raw/wiki.test.raw",
            "wiki.test.raw",
        ),
    )
}
"""Every task by name. Parts of ``mmlu`` and ``blimp`` have names too: ``mmlu_anatomy``, ``blimp_causative``."""

GROUPS = ("mmlu", "blimp")
"""Tasks of many parts; ``--limit`` counts in each part."""


def find_task(name: str) -> TaskRecord:
    """Return the record of a task, of a part of a group, or of ``text:FILE``.

    Raises:
        TaskError: no such task, with those that there are.
    """
    if name in TASKS:
        return TASKS[name]
    for group in GROUPS:
        if name.startswith(f"{group}_") and len(name) > len(group) + 1:
            return TASKS[group]
    file = name.removeprefix(TEXT_PREFIX)
    if file != name and file:
        return TaskRecord(
            name=name, about="a text, perplexity by word and byte", metric="word_perplexity", hub_task="", files=(file,)
        )
    raise TaskError(
        f"unknown task {name!r}{nearest(name, TASKS) or ';'} possible: {', '.join(TASKS)}, parts such"
        f" as blimp_causative, and {TEXT_PREFIX}FILE"
    )
