"""Documents of the evaluation tasks from local files, in the columns that their definitions read.

Every function turns one way in which a data set is handed around into the columns of the hub's version, and checks
every row; so a definition is the same for hub and file. Each task but the groups also reads ``NAME.jsonl``, a dump of
the hub's rows. Differences that a file forces (BoolQ without passages, GSM8K without training questions) stand in
``note`` and come out beside the score.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from microscale.errors import TaskError, counted
from microscale.evaluation.task_files import (
    TextFile,
    archive_names,
    csv_rows,
    find_file,
    json_lines,
    json_list,
    read_file,
    read_member,
)
from microscale.evaluation.task_rows import (
    ROW_CHECKS,
    Row,
    boolq_row,
    gsm8k_row,
    hellaswag_row,
    index_cell,
    piqa_row,
    siqa_row,
    text_cell,
    winogrande_row,
)
from microscale.evaluation.tasks import GROUPS, TEXT_PREFIX, find_task

LETTERS = "ABCDEFGHIJ"
GSM8K_EXAMPLES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDocuments:
    """Rows to ask (``test``), rows for few-shot examples where they are others, and where they came from."""

    test: list[Row]
    source: str
    fewshot: list[Row] = field(default_factory=list[Row])
    note: str = ""


def task_parts(task: str, folder: Path) -> list[str]:
    """Return the parts of a group that the local files have, e.g. the subjects of MMLU.

    Raises:
        TaskError: no files, or none of the expected names.
    """
    path = find_file(folder, task, find_task(task).files)
    names = archive_names(path, "_test.csv" if task == "mmlu" else ".jsonl")
    parts = sorted({Path(name).name.removesuffix("_test.csv").removesuffix(".jsonl") for name in names})
    if not parts:
        wanted = "test/SUBJECT_test.csv" if task == "mmlu" else "PHENOMENON.jsonl"
        raise TaskError(f"task {task}: {path} holds no {wanted}")
    return parts


def load_documents(task: str, folder: Path) -> TaskDocuments:
    """Return the documents of a task or of a part of a group from local files.

    Raises:
        TaskError: unknown task, no file, or a file that is damaged or of another form; the message names the line.
    """
    record = find_task(task)
    if task.startswith(TEXT_PREFIX) or record.name == "wikitext":
        return _texts(task, folder)
    if record.name in GROUPS:
        part = task.removeprefix(f"{record.name}_")
        return _mmlu(folder, part) if record.name == "mmlu" else _blimp(folder, part)
    path = find_file(folder, task, record.files)
    file = read_file(path)
    base = _base_name(path)
    if base == f"{task}.jsonl":
        rows = [ROW_CHECKS[task](row, where) for where, row in json_lines(file)]
    else:
        rows = _READERS[task](file, path)
    if not rows:
        raise TaskError(f"{file.where} holds no document of task {task}")
    if task == "gsm8k":
        return _with_gsm8k_examples(rows, path, folder)
    note = "without the passages: the file has none" if task == "boolq" and not any(r["passage"] for r in rows) else ""
    return TaskDocuments(test=rows, source=str(path), note=note)


def _base_name(path: Path) -> str:
    return path.name if path.suffix not in (".gz", ".bz2", ".xz", ".zip") else path.stem


# Forms in which data sets are handed around beside the hub's rows.


def _plain_lines(task: str) -> Callable[[TextFile, Path], list[Row]]:
    return lambda file, path: [ROW_CHECKS[task](row, where) for where, row in json_lines(file)]


def _read_hellaswag(file: TextFile, path: Path) -> list[Row]:
    """Read hub rows as JSON lines, or the text of llama.cpp: six lines a document (context, answer, four endings)."""
    if _base_name(path).endswith(".jsonl"):
        return [hellaswag_row(row, where) for where, row in json_lines(file)]
    lines = file.text.split("\n")
    lines = lines[:-1] if not lines[-1] else lines
    if len(lines) % 6:
        raise TaskError(f"{file.where} must hold 6 lines for each document, got {len(lines)}; it may be truncated")
    rows: list[Row] = []
    for start in range(0, len(lines), 6):
        context, label, *endings = (line.strip() for line in lines[start : start + 6])
        where = f"{file.where}, line {start + 1}"
        if not context or not all(endings):
            raise TaskError(f"{where}: a context and four endings must follow, none of them empty")
        rows.append({"query": context, "choices": endings, "label": index_cell(label, 4, "the answer", where)})
    return rows


def _read_piqa(file: TextFile, path: Path) -> list[Row]:
    """Read the questions and, from the file beside them, one label a line."""
    rows = json_lines(file)
    labels_path = path.with_name("valid-labels.lst")
    if not labels_path.exists():
        raise TaskError(f"task piqa: {labels_path} was expected beside {path.name}; it holds the answers")
    labels = read_file(labels_path).text.split()
    if len(labels) != len(rows):
        raise TaskError(
            f"{labels_path} has {counted(len(labels), 'answer')} for {counted(len(rows), 'question')};"
            " one of them is truncated"
        )
    return [piqa_row({**row, "label": label}, where) for (where, row), label in zip(rows, labels, strict=True)]


_QUESTION = re.compile(
    r"Please choose the correct answer to the question: (?P<question>.*?)\s+Answer1: (?P<choices>.*?)"
    r"\s+Answer format: (?P<format>answer1(?:/answer\d)+)\s*",
    re.DOTALL,
)
_BLANK = re.compile(
    r"Please choose the correct answer to fill in the blank to complete the given sentence: (?P<sentence>.*?)"
    r"\s+Option1: (?P<one>.*?) Option2: (?P<two>.*?)\s+Answer format: option1/option2\s*",
    re.DOTALL,
)
_TRUE_FALSE = re.compile(
    r"Please answer the following question with true or false, question: (?P<question>.*?)"
    r"\s+Answer format: true/false\s*",
    re.DOTALL,
)


def _instruction(row: Row, pattern: re.Pattern[str], where: str) -> dict[str, str]:
    match = pattern.fullmatch(text_cell(row, "instruction", where))
    if match is None:
        raise TaskError(f"{where}: the instruction is not of the known form, got {row['instruction']!r:.80}")
    return match.groupdict()


def _answer_index(row: Row, word: str, count: int, where: str) -> int:
    answer = text_cell(row, "answer", where)
    if not answer.startswith(word):
        raise TaskError(f"{where}: 'answer' must read {word}1 to {word}{count}, got {answer!r:.60}")
    return index_cell(answer.removeprefix(word), count, "'answer'", where, first=1)


def _multiple_choice(row: Row, where: str) -> tuple[str, list[str], int]:
    found = _instruction(row, _QUESTION, where)
    count = found["format"].count("/") + 1
    choices: list[str] = []
    rest = found["choices"]
    for number in range(2, count + 1):  # in this order only: a choice may itself speak of answers
        choice, mark, rest = rest.partition(f" Answer{number}: ")
        if not mark:
            raise TaskError(f"{where}: {counted(count, 'answer')} were announced, but there is no 'Answer{number}: '")
        choices.append(choice)
    return found["question"], [*choices, rest], _answer_index(row, "answer", count, where)


def _read_questions(task: str, question_key: str) -> Callable[[TextFile, Path], list[Row]]:
    def read(file: TextFile, path: Path) -> list[Row]:
        rows: list[Row] = []
        for where, row in json_list(file):
            question, texts, answer = _multiple_choice(row, where)
            labels = list(LETTERS[: len(texts)])
            found = {question_key: question, "choices": {"text": texts, "label": labels}, "answerKey": labels[answer]}
            rows.append(ROW_CHECKS[task](found, where))
        return rows

    return read


def _read_siqa(file: TextFile, path: Path) -> list[Row]:
    rows: list[Row] = []
    for where, row in json_list(file):
        question, texts, answer = _multiple_choice(row, where)
        if len(texts) != 3:
            raise TaskError(f"{where}: three answers were expected, got {len(texts)}")
        named = dict(zip(("answerA", "answerB", "answerC"), texts, strict=True))
        rows.append(siqa_row({"context": "", "question": question, **named, "label": answer + 1}, where))
    return rows


def _read_winogrande(file: TextFile, path: Path) -> list[Row]:
    rows: list[Row] = []
    for where, row in json_list(file):
        found = _instruction(row, _BLANK, where)
        answer = _answer_index(row, "option", 2, where) + 1
        texts = {"sentence": found["sentence"], "option1": found["one"], "option2": found["two"]}
        rows.append(winogrande_row({**texts, "answer": answer}, where))
    return rows


def _read_boolq(file: TextFile, path: Path) -> list[Row]:
    rows: list[Row] = []
    for where, row in json_list(file):
        answer = text_cell(row, "answer", where)
        if answer not in ("true", "false"):
            raise TaskError(f"{where}: 'answer' must be true or false, got {answer!r:.60}")
        question = _instruction(row, _TRUE_FALSE, where)["question"]
        rows.append(boolq_row({"question": question, "label": int(answer == "true")}, where))
    return rows


_READERS: dict[str, Callable[[TextFile, Path], list[Row]]] = {
    "lambada": _plain_lines("lambada"),
    "hellaswag": _read_hellaswag,
    "piqa": _read_piqa,
    "arc_easy": _read_questions("arc_easy", "question"),
    "arc_challenge": _read_questions("arc_challenge", "question"),
    "openbookqa": _read_questions("openbookqa", "question_stem"),
    "winogrande": _read_winogrande,
    "boolq": _read_boolq,
    "siqa": _read_siqa,
    "gsm8k": _plain_lines("gsm8k"),
    "humaneval": _plain_lines("humaneval"),
}


def _with_gsm8k_examples(rows: list[Row], path: Path, folder: Path) -> TaskDocuments:
    """Add few-shot examples: the training questions beside the test file, else the first test questions, not asked."""
    for name in ("train.jsonl", "gsm8k_train.jsonl"):
        train = path.with_name(name)
        if train.exists():
            examples = [gsm8k_row(row, where) for where, row in json_lines(read_file(train))]
            return TaskDocuments(test=rows, fewshot=examples, source=str(path))
    if len(rows) <= GSM8K_EXAMPLES:
        return TaskDocuments(test=rows, fewshot=rows, source=str(path), note="few-shot examples from the test itself")
    note = (
        f"no train.jsonl: the first {counted(GSM8K_EXAMPLES, 'question')} are the few-shot examples and are not asked"
    )
    return TaskDocuments(test=rows[GSM8K_EXAMPLES:], fewshot=rows[:GSM8K_EXAMPLES], source=str(path), note=note)


# Groups and texts.


def _mmlu(folder: Path, subject: str) -> TaskDocuments:
    path = find_file(folder, "mmlu", find_task("mmlu").files)
    names = {Path(name).name: name for name in archive_names(path, ".csv")}
    splits: dict[str, list[Row]] = {}
    for split in ("test", "dev"):
        name = names.get(f"{subject}_{split}.csv")
        if name is None and split == "test":
            raise TaskError(f"task mmlu_{subject}: {path} holds no {split}/{subject}_{split}.csv")
        splits[split] = [] if name is None else _mmlu_rows(read_member(path, name))
    return TaskDocuments(test=splits["test"], fewshot=splits["dev"], source=str(path))


def _mmlu_rows(file: TextFile) -> list[Row]:
    """Read a question, four choices and the answer a row; with a header and numbers, or without and letters."""
    rows: list[Row] = []
    for where, cells in csv_rows(file):
        if len(cells) != 6:
            raise TaskError(f"{where}: a row has 6 cells (question, 4 choices, answer), got {len(cells)}")
        question, *choices, answer = cells
        if not rows and (question, answer) == ("question", "answer"):
            continue
        if not question.strip() or not all(choice.strip() for choice in choices):
            raise TaskError(f"{where}: the question and its choices must not be empty")
        label = "ABCD".find(answer.strip()) if answer.strip() in tuple("ABCD") else answer
        rows.append({"question": question, "choices": choices, "answer": index_cell(label, 4, "the answer", where)})
    if not rows:
        raise TaskError(f"{file.where} holds no question")
    return rows


def _blimp(folder: Path, part: str) -> TaskDocuments:
    path = find_file(folder, "blimp", find_task("blimp").files)
    names = [name for name in archive_names(path, ".jsonl") if Path(name).name == f"{part}.jsonl"]
    if not names:
        raise TaskError(f"task blimp_{part}: {path} holds no {part}.jsonl")
    keys = ("sentence_good", "sentence_bad")
    lines = json_lines(read_member(path, names[0]))
    return TaskDocuments(test=[{key: text_cell(row, key, at) for key in keys} for at, row in lines], source=str(path))


_HEADING = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)


def _texts(task: str, folder: Path) -> TaskDocuments:
    """Return a text as documents: WikiText by its articles, any other text whole."""
    path = find_file(folder, task, find_task(task).files)
    text = read_file(path).text
    starts = [match.start() for match in _HEADING.finditer(text)] if task == "wikitext" else []
    if not starts:
        return TaskDocuments(test=[{"page": text}], source=str(path))
    pieces = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    return TaskDocuments(test=[{"page": piece} for piece in pieces], source=str(path))
