"""Rows of tasks: the columns that each definition reads, by hand, and rows that are wrong in every way we know."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from microscale.errors import TaskError
from microscale.evaluation.task_rows import ROW_CHECKS, index_cell, optional_text_cell, text_cell
from task_data import CHOICES, ROWS

Reader = Callable[[dict[str, Any], str, str], str]
HELLASWAG = ROWS["hellaswag"][0]
WINOGRANDE = ROWS["winogrande"][0]


@pytest.mark.parametrize("task", ROW_CHECKS)
def test_a_good_row_is_checked_and_not_changed(task: str) -> None:
    row = dict(ROWS[task][0])
    found = ROW_CHECKS[task](row, "f, line 1")
    assert row == ROWS[task][0]
    if task not in ("hellaswag", "winogrande"):  # whose definitions work on the columns first
        assert {key: found[key] for key in row} == row


@pytest.mark.parametrize(
    ("row", "read", "found"),
    [
        ({"a": "x"}, text_cell, "x"),
        ({"a": " x "}, text_cell, " x "),
        ({"a": " x "}, optional_text_cell, " x "),
        ({"a": " "}, optional_text_cell, " "),
        ({"a": ""}, optional_text_cell, ""),
        ({}, optional_text_cell, ""),
    ],
)
def test_texts(row: dict[str, Any], read: Reader, found: str) -> None:
    assert read(row, "a", "f") == found


@pytest.mark.parametrize(
    ("row", "read", "got"),
    [
        ({}, text_cell, "None"),
        ({"a": " \n"}, text_cell, r"' \n'"),
        ({"a": 3}, optional_text_cell, "3"),
        ({"a": None}, optional_text_cell, "None"),
    ],
)
def test_what_is_no_text(row: dict[str, Any], read: Reader, got: str) -> None:
    with pytest.raises(TaskError) as caught:
        read(row, "a", "f, line 2")
    assert str(caught.value) == f"f, line 2: 'a' must be a text that is not empty, got {got}"


@pytest.mark.parametrize(
    ("value", "first", "found"),
    [(0, 0, 0), (3, 0, 3), ("2", 0, 2), (" 2 ", 0, 2), ("1", 1, 0), (4, 1, 3), (True, 0, 1)],
)
def test_numbers(value: Any, first: int, found: int) -> None:
    assert index_cell(value, 4, "'label'", "f", first=first) == found


@pytest.mark.parametrize("value", [-1, 4, 0.0, None, "", "-1", "1.0", "four", [0], "²"])
def test_what_is_no_number_of_four(value: Any) -> None:
    with pytest.raises(TaskError, match=rf"^f: 'label' must be a number from 0 to 3, got {re.escape(repr(value))}$"):
        index_cell(value, 4, "'label'", "f")


def test_a_number_from_1_says_so() -> None:
    for value in (0, "3"):
        with pytest.raises(TaskError, match="must be a number from 1 to 2"):
            index_cell(value, 2, "'answer'", "f", first=1)


@pytest.mark.parametrize(
    ("changes", "query"),
    [
        ({}, "Sailing: A man pulls a rope. The boat"),
        ({"ctx_b": ""}, "Sailing: A man pulls a rope."),
        ({"ctx_a": "One [title] Two [step] three."}, "Sailing: One. Two three. The boat"),
        ({"ctx_a": "a.", "ctx_b": "he saw KIM"}, "Sailing: a. He saw kim"),  # as lm-eval's capitalize() has it
    ],
)
def test_the_context_of_hellaswag(changes: dict[str, Any], query: str) -> None:
    found = ROW_CHECKS["hellaswag"]({**HELLASWAG, **changes}, "f")
    assert found["query"] == query and found["label"] == 0
    assert found["choices"] == ["turns slowly.", "eats. bread.", "sings.", "is a rope."]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"prefixes": ["Ann thanked Eve because Ann", "Ann thanked Eve because Eve"], "rest": "had helped."}),
        ({"sentence": "_ ran."}, {"prefixes": ["Ann", "Eve"], "rest": "ran."}),
        ({"sentence": "a _ b _ c"}, {"prefixes": ["a Ann", "a Eve"], "rest": "b _ c"}),  # the first blank is filled
    ],
)
def test_the_blank_of_winogrande(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ROW_CHECKS["winogrande"]({**WINOGRANDE, **changes}, "f") == {**expected, "label": 1}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "is ice cold?", "answer": True}, {"passage": "", "question": "is ice cold", "label": 1}),
        ({"question": " is it ", "label": False, "passage": "p"}, {"passage": "p", "question": "is it", "label": 0}),
        ({"question": "a??", "label": "1"}, {"passage": "", "question": "a?", "label": 1}),
    ],
)
def test_forms_of_boolq(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ROW_CHECKS["boolq"](row, "f") == expected


def test_columns_that_nothing_reads_are_left_out() -> None:
    assert ROW_CHECKS["piqa"]({**ROWS["piqa"][0], "id": 7}, "f") == ROWS["piqa"][0]
    siqa = {key: value for key, value in ROWS["siqa"][0].items() if key != "context"}
    assert ROW_CHECKS["siqa"](siqa, "f") == {**siqa, "context": ""}, "a context may be absent"


NUMBER = "must be a number from"
TEXT = "must be a text that is not empty"
WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "lambada": [
        ({"text": "word"}, "needs a last word after a space, got 'word'"),
        ({"text": " word"}, "needs a last word after a space"),
        ({"text": "ends in a space "}, "needs a last word after a space"),
        ({"text": 3}, f"'text' {TEXT}, got 3"),
    ],
    "hellaswag": [
        ({"label": "4"}, f"'label' {NUMBER} 0 to 3, got '4'"),
        ({"label": None}, f"'label' {NUMBER} 0 to 3, got None"),
        ({"endings": ["a"]}, "'endings' must be 4 texts, got ['a']"),
        ({"endings": ["a", "b", "c", ""]}, "'endings' must be 4 texts"),
        ({"ctx_a": ""}, f"'ctx_a' {TEXT}, got ''"),
    ],
    "piqa": [
        ({"label": 2}, f"'label' {NUMBER} 0 to 1, got 2"),
        ({"label": -1}, "got -1"),
        ({"label": 0.0}, "got 0.0"),
        ({"sol1": ""}, f"'sol1' {TEXT}"),
        ({"sol2": None}, f"'sol2' {TEXT}, got None"),
    ],
    "arc_easy": [
        ({"answerKey": "E"}, "'answerKey' 'E' is none of the labels ['A', 'B', 'C', 'D']"),
        ({"choices": {}}, "'choices' must hold as many 'text' as 'label', at least two, got {}"),
        ({"choices": {"text": ["a"], "label": ["A"]}}, "at least two"),
        ({"question": " "}, f"'question' {TEXT}"),
    ],
    "arc_challenge": [
        ({"choices": {"text": ["a", ""], "label": ["A", "B"]}}, "a choice must be a text that is not empty"),
        ({"choices": [1]}, "'choices' must hold as many 'text' as 'label'"),
    ],
    "openbookqa": [
        ({"question_stem": None}, f"'question_stem' {TEXT}"),
        ({"choices": {"text": [*CHOICES["text"], "e"], "label": CHOICES["label"]}}, "as many 'text' as 'label'"),
    ],
    "winogrande": [
        ({"sentence": "no blank"}, "needs a blank '_' and words after it, got 'no blank'"),
        ({"sentence": "at the end _"}, "needs a blank '_' and words after it"),
        ({"answer": "0"}, f"'answer' {NUMBER} 1 to 2, got '0'"),
        ({"option1": ""}, f"'option1' {TEXT}"),
    ],
    "boolq": [
        ({"label": 2}, f"'label' {NUMBER} 0 to 1, got 2"),
        ({"label": "yes"}, "got 'yes'"),
        ({"question": ""}, f"'question' {TEXT}"),
        ({"passage": 3}, f"'passage' {TEXT}, got 3"),
    ],
    "siqa": [
        ({"label": "0"}, f"'label' {NUMBER} 1 to 3, got '0'"),
        ({"label": "4"}, f"'label' {NUMBER} 1 to 3, got '4'"),
        ({"answerC": ""}, f"'answerC' {TEXT}"),
    ],
    "gsm8k": [
        ({"answer": "4"}, "'answer' must end in '#### NUMBER', got '4'"),
        ({"question": ""}, f"'question' {TEXT}"),
    ],
    "humaneval": [({"prompt": ""}, f"'prompt' {TEXT}"), ({"entry_point": None}, f"'entry_point' {TEXT}, got None")],
}


@pytest.mark.parametrize(("task", "change", "problem"), [(task, *each) for task, row in WRONG.items() for each in row])
def test_what_is_wrong_with_a_row_is_told(task: str, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(TaskError) as caught:
        ROW_CHECKS[task]({**ROWS[task][0], **change}, "f, line 2")
    assert str(caught.value).startswith("f, line 2: ") and problem in str(caught.value)


def test_every_check_has_wrong_rows() -> None:
    assert set(WRONG) == set(ROW_CHECKS)
