"""The evaluation tasks that are known by name: what each asks, how it is scored, and where its data may lie.

The definitions that lm-eval runs are YAML files in integrations/tasks; this table says what a reader of a result
needs (main metric, chance level) and which local files hold the data, so that a task runs without a network.
"""

from __future__ import annotations

from dataclasses import dataclass

from microscale.errors import TaskError

TEXT_PREFIX = "text:"
"""``text:FILE`` is the task that scores a text file: perplexity by word and by byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecord:
    """One task.

    ``metric`` is the main one of those that are reported, ``chance`` its value for blind guessing (None: it has no such
    value). ``hub_task`` is lm-eval's own name, which loads from the hub. ``files`` are the places below the data folder
    where local data is looked for, most wanted first; empty: hub only. ``tested_with`` says whose files those are.
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


TASKS: dict[str, TaskRecord] = {
    record.name: record
    for record in (
        TaskRecord(
            name="lambada",
            about="the last word of a passage",
            metric="acc",
            hub_task="lambada_openai",
            chance=0.0,
            files=("lambada.jsonl", "lambada_test.jsonl"),
        ),
        TaskRecord(
            name="hellaswag",
            about="the ending of an everyday scene, of 4",
            metric="acc_norm",
            hub_task="hellaswag",
            chance=0.25,
            files=("hellaswag.jsonl", "hellaswag/hellaswag_val.jsonl", "hellaswag/hellaswag_val_full.txt"),
        ),
        TaskRecord(
            name="piqa",
            about="which of 2 ways reaches a physical goal",
            metric="acc",
            hub_task="piqa",
            chance=0.5,
            files=("piqa.jsonl", "piqa/valid.jsonl"),
        ),
        TaskRecord(
            name="arc_easy",
            about="school science, easy part, mostly of 4",
            metric="acc",
            hub_task="arc_easy",
            chance=0.25,
            files=("arc_easy.jsonl", _form("ARC-Easy")),
        ),
        TaskRecord(
            name="arc_challenge",
            about="school science, hard part, mostly of 4",
            metric="acc_norm",
            hub_task="arc_challenge",
            chance=0.25,
            files=("arc_challenge.jsonl", _form("ARC-Challenge")),
        ),
        TaskRecord(
            name="winogrande",
            about="whom a pronoun means, of 2",
            metric="acc",
            hub_task="winogrande",
            chance=0.5,
            files=("winogrande.jsonl", _form("winogrande")),
        ),
        TaskRecord(
            name="boolq",
            about="yes or no (with the passage where the file has it)",
            metric="acc",
            hub_task="boolq",
            chance=0.5,
            files=("boolq.jsonl", _form("boolq")),
        ),
        TaskRecord(
            name="openbookqa",
            about="elementary science facts, of 4",
            metric="acc_norm",
            hub_task="openbookqa",
            chance=0.25,
            files=("openbookqa.jsonl", _form("openbookqa")),
        ),
        TaskRecord(
            name="siqa",
            about="social situations, of 3",
            metric="acc",
            hub_task="social_iqa",
            chance=1 / 3,
            files=("siqa.jsonl", _form("social_i_qa")),
        ),
        TaskRecord(
            name="mmlu",
            about="57 subjects of school and university, of 4",
            metric="acc",
            hub_task="mmlu",
            chance=0.25,
            files=("mmlu", "mmlu.zip"),
        ),
        TaskRecord(
            name="blimp",
            about="which of 2 sentences is grammatical, 67 phenomena",
            metric="acc",
            hub_task="blimp",
            chance=0.5,
            files=("BLiMP.zip", "BLiMP", "blimp"),
        ),
        TaskRecord(
            name="gsm8k",
            about="school mathematics in words, generated",
            metric="exact_match,flexible-extract",
            hub_task="gsm8k",
            chance=0.0,
            files=("gsm8k.jsonl", "gsm8k/test.jsonl"),
            default_fewshot=5,
        ),
        TaskRecord(
            name="humaneval",
            about="Python functions, generated and executed",
            metric="pass_at_1",
            hub_task="humaneval",
            chance=0.0,
            files=("humaneval.jsonl", "humaneval/HumanEval.jsonl"),
            runs_code=True,
        ),
        TaskRecord(
            name="math500",
            about="competition mathematics, generated",
            metric="exact_match",
            hub_task="minerva_math500",
            chance=0.0,
        ),
        TaskRecord(name="aime24", about="AIME of 2024, generated", metric="exact_match", hub_task="aime24", chance=0.0),
        TaskRecord(name="aime25", about="AIME of 2025, generated", metric="exact_match", hub_task="aime25", chance=0.0),
        TaskRecord(
            name="wikitext",
            about="WikiText-2, perplexity by word and byte",
            metric="word_perplexity",
            hub_task="wikitext",
            files=("wikitext2_test.txt", "wikitext-2-raw/wiki.test.raw", "wiki.test.raw"),
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
            name=name,
            about="a text, perplexity by word and byte",
            metric="word_perplexity",
            hub_task="",
            files=(file,),
        )
    raise TaskError(
        f"unknown task {name!r}; possible: {', '.join(TASKS)}, parts such as blimp_causative, and {TEXT_PREFIX}FILE"
    )
