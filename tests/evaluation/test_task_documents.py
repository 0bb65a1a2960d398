"""Documents of every task: each file form by hand, hub rows, and rows that are wrong in every way we could think of."""

from __future__ import annotations

import bz2
import json
from pathlib import Path
from typing import Any

import pytest

from microscale.errors import TaskError
from microscale.evaluation.task_documents import load_documents, task_parts
from task_data import BLIMP, CHOICES, MMLU, MMLU_DEV, ROWS, write_jsonl, write_task_data


@pytest.mark.parametrize("task", ROWS)
def test_rows_of_the_hub(task: str, tmp_path: Path) -> None:
    found = load_documents(task, write_task_data(tmp_path))
    assert len(found.test) + (len(found.fewshot) if task == "gsm8k" else 0) == len(ROWS[task])
    assert found.source == str(tmp_path / f"{task}.jsonl")
    if task not in ("hellaswag", "winogrande", "gsm8k", "humaneval"):
        assert [{key: row[key] for key in ROWS[task][0]} for row in found.test] == ROWS[task]


def test_hellaswag_rows(tmp_path: Path) -> None:
    first, second = load_documents("hellaswag", write_task_data(tmp_path)).test
    assert first["query"] == "Sailing: A man pulls a rope. The boat"
    assert first["choices"][:2] == ["turns slowly.", "eats. bread."] and first["label"] == 0
    assert second["label"] == 3


def test_hellaswag_text_of_six_lines(tmp_path: Path) -> None:
    lines = ["Tea: Water boils. she", "2", "a", "b", "c", "d", "Sea: A ship. it", "0", "e", "f", "g", "h"]
    path = tmp_path / "hellaswag" / "hellaswag_val_full.txt.bz2"
    path.parent.mkdir()
    path.write_bytes(bz2.compress(("\n".join(lines) + "\n").encode()))
    first, second = load_documents("hellaswag", tmp_path).test
    assert first == {"query": "Tea: Water boils. she", "choices": ["a", "b", "c", "d"], "label": 2}
    assert second["label"] == 0
    for broken, words in (
        (lines[:-1], "6 lines"),
        ([*lines[:7], "4", *lines[8:]], "line 7: the answer"),
        ([*lines[:2], " ", *lines[3:]], "four endings"),
    ):
        path.write_bytes(bz2.compress("\n".join(broken).encode()))
        with pytest.raises(TaskError, match=words):
            load_documents("hellaswag", tmp_path)


def test_piqa_with_labels_beside(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "label"} for row in ROWS["piqa"]]
    write_jsonl(tmp_path / "piqa" / "valid.jsonl", rows)
    with pytest.raises(TaskError, match=r"valid-labels\.lst was expected"):
        load_documents("piqa", tmp_path)
    labels = tmp_path / "piqa" / "valid-labels.lst"
    labels.write_text("0\n1\n")
    assert load_documents("piqa", tmp_path).test == ROWS["piqa"]
    for content, words in (("0\n", "1 answer for 2 questions"), ("0\n2\n", "from 0 to 1"), ("0\nx\n", "got 'x'")):
        labels.write_text(content)
        with pytest.raises(TaskError, match=words):
            load_documents("piqa", tmp_path)


QUESTION = "Please choose the correct answer to the question: "


def form(folder: Path, name: str, instruction: str, answer: str) -> None:
    path = folder / "instruction_form" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([{"instruction": instruction, "input": "", "output": "", "answer": answer}]))


@pytest.mark.parametrize(
    ("task", "name", "instruction", "answer", "expected"),
    [
        (
            "arc_easy",
            "ARC-Easy",
            f"{QUESTION}What falls from clouds?\n\nAnswer1: rain Answer2: stone Answer3: paper Answer4: fog"
            "\n\nAnswer format: answer1/answer2/answer3/answer4",
            "answer1",
            {"question": "What falls from clouds?", "choices": CHOICES, "answerKey": "A"},
        ),
        (
            "arc_challenge",
            "ARC-Challenge",
            f"{QUESTION}Which?\n\nAnswer1: see Answer1: b Answer2: c\n\nAnswer format: answer1/answer2",
            "answer2",
            {"question": "Which?", "choices": {"text": ["see Answer1: b", "c"], "label": ["A", "B"]}, "answerKey": "B"},
        ),
        (
            "openbookqa",
            "openbookqa",
            f"{QUESTION}Fog is\n\nAnswer1: wet Answer2: dry\n\nAnswer format: answer1/answer2",
            "answer1",
            {"question_stem": "Fog is", "choices": {"text": ["wet", "dry"], "label": ["A", "B"]}, "answerKey": "A"},
        ),
        (
            "siqa",
            "social_i_qa",
            f"{QUESTION}Kim ran. Why?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3",
            "answer3",
            {"context": "", "question": "Kim ran. Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        ),
        (
            "winogrande",
            "winogrande",
            "Please choose the correct answer to fill in the blank to complete the given sentence: Ann met Eve and _"
            " smiled.\n\nOption1: Ann Option2: Eve Answer format: option1/option2",
            "option2",
            {"prefixes": ["Ann met Eve and Ann", "Ann met Eve and Eve"], "rest": "smiled.", "label": 1},
        ),
        (
            "boolq",
            "boolq",
            "Please answer the following question with true or false, question: is ice cold?"
            "\n\nAnswer format: true/false",
            "true",
            {"passage": "", "question": "is ice cold", "label": 1},
        ),
    ],
)
def test_instruction_form(
    task: str, name: str, instruction: str, answer: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    form(tmp_path, name, instruction, answer)
    found = load_documents(task, tmp_path)
    assert found.test == [expected]
    assert bool(found.note) == (task == "boolq")
    for wrong_instruction, wrong_answer in (
        (instruction, "answer9"),
        (instruction, ""),
        (instruction.replace("nswer format", "nswers"), answer),
        (instruction[:40], answer),
        (instruction.replace("2:", "3:"), answer),
    ):
        if task == "boolq" and "2:" not in instruction and wrong_instruction == instruction and wrong_answer == answer:
            continue
        form(tmp_path, name, wrong_instruction, wrong_answer)
        with pytest.raises(TaskError, match="item 1"):
            load_documents(task, tmp_path)


@pytest.mark.parametrize("task", ROWS)
def test_a_wrong_row_is_named_by_its_line(task: str, tmp_path: Path) -> None:
    """What is wrong with a row is told in test_task_rows.py."""
    write_jsonl(tmp_path / f"{task}.jsonl", [ROWS[task][0], {}])
    with pytest.raises(TaskError, match=rf"{task}\.jsonl, line 2: '"):
        load_documents(task, tmp_path)


@pytest.mark.parametrize("task", ROWS)
def test_a_truncated_file(task: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / f"{task}.jsonl", ROWS[task])
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    with pytest.raises(TaskError, match="not JSON"):
        load_documents(task, tmp_path)


def test_gsm8k_examples(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", ROWS["gsm8k"])
    found = load_documents("gsm8k", tmp_path)
    assert found.fewshot == ROWS["gsm8k"][:8] and found.test == ROWS["gsm8k"][8:] and "not asked" in found.note
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", ROWS["gsm8k"][:2])
    found = load_documents("gsm8k", tmp_path)
    assert found.fewshot == ROWS["gsm8k"][:2] and found.test == ROWS["gsm8k"] and not found.note


def test_gsm8k_with_few_questions_shows_them_themselves(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "gsm8k.jsonl", ROWS["gsm8k"][:8])
    found = load_documents("gsm8k", tmp_path)
    assert found.test == found.fewshot == ROWS["gsm8k"][:8] and found.note == "few-shot examples from the test itself"


def test_three_answers_of_social_iqa(tmp_path: Path) -> None:
    form(
        tmp_path, "social_i_qa", f"{QUESTION}Why?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2", "answer1"
    )
    with pytest.raises(TaskError, match="item 1: three answers were expected, got 2"):
        load_documents("siqa", tmp_path)


def test_a_list_without_an_item(tmp_path: Path) -> None:
    path = tmp_path / "instruction_form" / "winogrande.json"
    path.parent.mkdir()
    path.write_text("[]")
    with pytest.raises(TaskError, match="holds no document of task winogrande"):
        load_documents("winogrande", tmp_path)


def test_groups(tmp_path: Path) -> None:
    folder = write_task_data(tmp_path)
    assert task_parts("blimp", folder) == sorted(BLIMP) and task_parts("mmlu", folder) == sorted(MMLU)
    assert load_documents("blimp_plain", folder).test == BLIMP["plain"]
    found = load_documents("mmlu_knots", folder)
    assert [(row["question"], row["choices"], row["answer"]) for row in found.test] == MMLU["knots"]
    assert [row["answer"] for row in found.fewshot] == [answer for *_, answer in MMLU_DEV]
    for task in ("blimp_absent", "mmlu_absent"):
        with pytest.raises(TaskError, match="holds no"):
            load_documents(task, folder)
    with pytest.raises(TaskError, match=r"holds no test/SUBJECT_test\.csv"):
        (tmp_path / "empty" / "mmlu").mkdir(parents=True)
        task_parts("mmlu", tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("Why?,a,b,c,d,4\n", "from 0 to 3"),
        ("Why?,a,b,c,d,E\n", "got 'E'"),
        ("Why?,a,b,c,d\n", "6 cells"),
        ("Why?,a,b,,d,1\n", "must not be empty"),
        ("question,choice0,choice1,choice2,choice3,answer\n", "no question"),
        ('Why?,"a,b,c,d,1\n', "not CSV"),
        ("", "is empty"),
    ],
)
def test_broken_mmlu(content: str, words: str, tmp_path: Path) -> None:
    folder = write_task_data(tmp_path)
    (folder / "mmlu" / "test" / "knots_test.csv").write_text(content)
    with pytest.raises(TaskError, match=words):
        load_documents("mmlu_knots", folder)


def test_mmlu_as_first_published(tmp_path: Path) -> None:
    """Without a header, the answer a letter."""
    folder = write_task_data(tmp_path)
    (folder / "mmlu" / "test" / "knots_test.csv").write_text("Why?,a,b,c,d,C\nHow?,a,b,c,d,A\n")
    assert [row["answer"] for row in load_documents("mmlu_knots", folder).test] == [2, 0]


def test_texts(tmp_path: Path) -> None:
    folder = write_task_data(tmp_path)
    first, second = (row["page"] for row in load_documents("wikitext", folder).test)
    assert first.startswith(" = First ship = \n") and "Later" in first and second.startswith(" = Second = \n")
    (row,) = load_documents("text:note.txt", folder).test
    assert row["page"].startswith("A short text")
    with pytest.raises(TaskError, match=r"absent\.txt"):
        load_documents("text:absent.txt", folder)


def test_a_task_of_the_hub_alone_has_no_file() -> None:
    with pytest.raises(TaskError, match="hub alone"):
        load_documents("math500", Path())


def test_the_shared_files(shared_dir: Path) -> None:
    """Every task whose file lies in the shared folder, in full, with the published numbers of documents."""
    folder = shared_dir / "tasks"
    counts = {
        "lambada": 5153,
        "hellaswag": 10042,
        "piqa": 1838,
        "arc_easy": 2376,
        "winogrande": 1267,
        "boolq": 3270,
        "openbookqa": 500,
        "gsm8k": 1319 - 8,
        "humaneval": 164,
        "wikitext": 62,
    }
    for task, count in counts.items():
        if task != "wikitext":
            assert len(load_documents(task, folder).test) == count, task
    assert len(load_documents("wikitext", shared_dir).test) >= 60
    assert len(task_parts("mmlu", folder)) == 57 and len(task_parts("blimp", folder)) == 67
    subjects = [load_documents(f"mmlu_{subject}", folder) for subject in task_parts("mmlu", folder)]
    assert sum(len(found.test) for found in subjects) == 14042 and {len(found.fewshot) for found in subjects} == {5}
    assert all(len(load_documents(f"blimp_{part}", folder).test) == 1000 for part in task_parts("blimp", folder))
