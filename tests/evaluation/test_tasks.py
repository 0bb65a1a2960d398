"""The table of tasks: names, what blind guessing scores, and where files may lie."""

from __future__ import annotations

import re

import pytest

from microscale.errors import TaskError
from microscale.evaluation.task_rows import ROW_CHECKS
from microscale.evaluation.tasks import GROUPS, TASKS, find_task

CHOICES = {
    **dict.fromkeys(("piqa", "winogrande", "boolq", "blimp"), 2),
    **dict.fromkeys(("hellaswag", "arc_easy", "arc_challenge", "openbookqa", "mmlu"), 4),
    "siqa": 3,
}
GENERATED = ("lambada", "gsm8k", "humaneval", "math500", "aime24", "aime25")


def test_chance_is_one_of_the_choices() -> None:
    assert {name: record.chance for name, record in TASKS.items() if record.chance} == {
        name: 1 / number for name, number in CHOICES.items()
    }
    assert all(TASKS[name].chance == 0.0 for name in GENERATED), "a word that is written is not guessed"
    assert TASKS["wikitext"].chance is None, "a perplexity has no chance level"
    assert set(TASKS) == {*CHOICES, *GENERATED, "wikitext"}


def test_what_else_the_table_says() -> None:
    assert [name for name, record in TASKS.items() if record.runs_code] == ["humaneval"]
    assert [name for name, record in TASKS.items() if record.default_fewshot] == ["gsm8k"]
    assert [name for name, record in TASKS.items() if not record.files] == ["math500", "aime24", "aime25"]
    assert all(name == record.name and record.about and record.hub_task for name, record in TASKS.items())
    first = [record.files[0] for record in TASKS.values() if record.files]
    assert len(set(first)) == len(first), "no two tasks take each other's file"


def test_every_task_with_lines_has_a_check_of_its_rows() -> None:
    lines = {name for name, record in TASKS.items() if any(file.endswith(".jsonl") for file in record.files)}
    assert lines == set(ROW_CHECKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_name_finds_its_record(name: str) -> None:
    assert find_task(name) is TASKS[name]


@pytest.mark.parametrize(
    ("name", "group"), [("mmlu_anatomy", "mmlu"), ("blimp_causative", "blimp"), ("blimp__", "blimp")]
)
def test_parts_belong_to_their_group(name: str, group: str) -> None:
    assert find_task(name) is TASKS[group] and group in GROUPS


@pytest.mark.parametrize("file", ["notes.txt", "deep/er.txt", "text:", "../up.txt"])
def test_a_text_is_a_task_of_its_own(file: str) -> None:
    record = find_task(f"text:{file}")
    assert (record.name, record.files, record.metric) == (f"text:{file}", (file,), "word_perplexity")
    assert record.chance is None and not record.hub_task and record.name not in TASKS


@pytest.mark.parametrize("name", ["", "piqas", "mmlu_", "blimp_", "text:", "BLiMP", "piqa ", "arc"])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(
        TaskError, match=rf"^unknown task {re.escape(repr(name))};( did you mean \w+\?)? possible: lambada, hellaswag, "
    ) as error:
        find_task(name)
    assert str(error.value).endswith("wikitext, parts such as blimp_causative, and text:FILE")
