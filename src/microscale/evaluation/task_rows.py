"""Rows of the evaluation tasks: for each task one check that returns the columns its definition reads.

The columns are those of the hub's version of a data set, but for HellaSwag and WinoGrande, whose definitions work on
the columns first; that work is done here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from microscale.errors import TaskError

Row = dict[str, Any]


def text_cell(row: Row, key: str, where: str) -> str:
    """Return a text of a row that must be there."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"{where}: {key!r} must be a text that is not empty, got {value!r:.60}")
    return value


def optional_text_cell(row: Row, key: str, where: str) -> str:
    """Return a text of a row that may be absent or empty."""
    value = row.get(key, "")
    return value if isinstance(value, str) else text_cell(row, key, where)


def index_cell(value: Any, count: int, what: str, where: str, *, first: int = 0) -> int:
    """Return a number of ``count`` that begin at ``first``, as an index from 0; a text of digits counts too."""
    is_number = isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal())
    found = int(value) - first if is_number and not isinstance(value, float) else -1
    if not 0 <= found < count:
        raise TaskError(f"{where}: {what} must be a number from {first} to {first + count - 1}, got {value!r:.60}")
    return found


def _lambada(row: Row, where: str) -> Row:
    text = text_cell(row, "text", where)
    before, _, last = text.rpartition(" ")
    if not before.strip() or not last:
        raise TaskError(f"{where}: a passage needs a last word after a space, got {text!r:.60}")
    return {"text": text}


def hellaswag_row(row: Row, where: str) -> Row:
    """Join the context of HellaSwag, without WikiHow's marks."""
    endings = row.get("endings")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(e, str) and e.strip() for e in endings):
        raise TaskError(f"{where}: 'endings' must be 4 texts, got {endings!r:.60}")
    context = f"{text_cell(row, 'ctx_a', where)} {optional_text_cell(row, 'ctx_b', where).capitalize()}"
    query = _without_brackets(f"{text_cell(row, 'activity_label', where)}: {context}")
    choices = [_without_brackets(ending) for ending in endings]
    return {"query": query, "choices": choices, "label": index_cell(row.get("label"), 4, "'label'", where)}


def _without_brackets(text: str) -> str:
    """Turn WikiHow's ``[title]`` into a full stop and drop its other bracketed marks."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def piqa_row(row: Row, where: str) -> Row:
    """Check a row of PIQA."""
    goal = optional_text_cell(row, "goal", where)
    found = {key: text_cell(row, key, where) for key in ("sol1", "sol2")}
    return {"goal": goal, **found, "label": index_cell(row.get("label"), 2, "'label'", where)}


def _choices(row: Row, question_key: str, where: str) -> Row:
    """Check the rows of ARC and OpenBookQA: choices with labels, one of which is the answer."""
    choices = row.get("choices")
    texts, labels = (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(labels, list) or not 1 < len(texts) == len(labels):
        raise TaskError(f"{where}: 'choices' must hold as many 'text' as 'label', at least two, got {choices!r:.60}")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise TaskError(f"{where}: a choice must be a text that is not empty, got {texts!r:.60}")
    answer = text_cell(row, "answerKey", where).strip()
    if answer not in labels:
        raise TaskError(f"{where}: 'answerKey' {answer!r} is none of the labels {labels}")
    return {
        question_key: text_cell(row, question_key, where),
        "choices": {"text": texts, "label": labels},
        "answerKey": answer,
    }


def winogrande_row(row: Row, where: str) -> Row:
    """Fill the blank both ways: the beginnings are compared by what they make of the rest of the sentence."""
    sentence = text_cell(row, "sentence", where)
    before, blank, rest = sentence.partition("_")
    if not blank or not rest.strip():
        raise TaskError(f"{where}: a sentence needs a blank '_' and words after it, got {sentence!r:.60}")
    answer = index_cell(row.get("answer"), 2, "'answer'", where, first=1)
    prefixes = [before + text_cell(row, key, where) for key in ("option1", "option2")]
    return {"prefixes": prefixes, "rest": rest.strip(), "label": answer}


def boolq_row(row: Row, where: str) -> Row:
    """Check a row of BoolQ, whose passage may be absent."""
    label = row.get("label", row.get("answer"))
    if isinstance(label, bool):
        label = int(label)
    question = text_cell(row, "question", where).strip().removesuffix("?")
    passage = optional_text_cell(row, "passage", where)
    return {"passage": passage, "question": question, "label": index_cell(label, 2, "'label'", where)}


def siqa_row(row: Row, where: str) -> Row:
    """Check a row of Social IQa; its label counts from 1."""
    found = {key: text_cell(row, key, where) for key in ("question", "answerA", "answerB", "answerC")}
    label = index_cell(row.get("label"), 3, "'label'", where, first=1)
    return {"context": optional_text_cell(row, "context", where), **found, "label": str(label + 1)}


def gsm8k_row(row: Row, where: str) -> Row:
    """Check a row of GSM8K."""
    answer = text_cell(row, "answer", where)
    if "####" not in answer:
        raise TaskError(f"{where}: 'answer' must end in '#### NUMBER', got {answer!r:.60}")
    return {"question": text_cell(row, "question", where), "answer": answer}


def _humaneval(row: Row, where: str) -> Row:
    return {key: text_cell(row, key, where) for key in ("task_id", "prompt", "test", "entry_point")}


ROW_CHECKS: dict[str, Callable[[Row, str], Row]] = {
    "lambada": _lambada,
    "hellaswag": hellaswag_row,
    "piqa": piqa_row,
    "arc_easy": lambda row, where: _choices(row, "question", where),
    "arc_challenge": lambda row, where: _choices(row, "question", where),
    "openbookqa": lambda row, where: _choices(row, "question_stem", where),
    "winogrande": winogrande_row,
    "boolq": boolq_row,
    "siqa": siqa_row,
    "gsm8k": gsm8k_row,
    "humaneval": _humaneval,
}
