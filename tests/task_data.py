"""Small data folders for the tests of evaluation tasks: two to four documents of each, in the hub's columns.

No sentence is taken from a data set.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

CHOICES = {"text": ["rain", "stone", "paper", "fog"], "label": ["A", "B", "C", "D"]}

ROWS: dict[str, list[dict[str, Any]]] = {
    "lambada": [
        {"text": "The sea was calm, and the captain looked at the sea"},
        {"text": "She opened the letter.\n\nIt was not the letter"},
        {"text": "One two three two one two  three"},
    ],
    "hellaswag": [
        {
            "activity_label": "Sailing",
            "ctx_a": "A man pulls [substeps] a rope.",
            "ctx_b": "the Boat",
            "endings": ["turns  slowly.", "eats [title] bread.", "sings.", "is a rope."],
            "label": "0",
        },
        {"activity_label": "Tea", "ctx_a": "Water boils.", "ctx_b": "", "endings": ["a", "b", "c", "d"], "label": "3"},
    ],
    "piqa": [
        {"goal": "Dry a coat", "sol1": "Hang it up.", "sol2": "Put it in water.", "label": 0},
        {"goal": "Cut bread", "sol1": "Use a spoon.", "sol2": "Use a knife.", "label": 1},
    ],
    "arc_easy": [
        {"question": "What falls from clouds?", "choices": CHOICES, "answerKey": "A"},
        {"question": "What is hard?", "choices": {"text": ["air", "stone"], "label": ["1", "2"]}, "answerKey": "2"},
    ],
    "arc_challenge": [{"question": "What burns?", "choices": CHOICES, "answerKey": "C"}] * 2,
    "openbookqa": [
        {"question_stem": "Wet air near the ground is", "choices": CHOICES, "answerKey": "D"},
        {"question_stem": "Books are made of", "choices": CHOICES, "answerKey": "C"},
    ],
    "winogrande": [
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        {"sentence": "The cup fell on the floor and _ broke.", "option1": "cup", "option2": "floor", "answer": "1"},
    ],
    "boolq": [
        {"passage": "Salt is a mineral.", "question": "is salt a mineral", "label": 1},
        {"passage": "Ice floats.", "question": "does ice sink", "label": 0},
    ],
    "siqa": [
        {
            "context": "Kim fed the dog.",
            "question": "How is the dog?",
            "answerA": "hungry",
            "answerB": "full",
            "answerC": "a cat",
            "label": "2",
        }
    ]
    * 2,
    "gsm8k": [
        {"question": f"Tom has {n} nuts and eats one. How many are left?", "answer": f"{n}-1={n - 1}\n#### {n - 1}"}
        for n in range(3, 15)
    ],
    "humaneval": [
        {
            "task_id": "T/0",
            "prompt": 'def double(x):\n    """Twice x."""\n',
            "test": "def check(f):\n    assert f(2) == 4\n",
            "entry_point": "double",
        }
    ],
}
BLIMP = {
    "plain": [
        {"sentence_good": "The dog runs.", "sentence_bad": "The dog run."},
        {"sentence_good": "Dogs run.", "sentence_bad": "Dogs runs."},
    ],
    "other": [{"sentence_good": "She saw herself.", "sentence_bad": "She saw himself."}],
}
MMLU = {
    "knots": [("Which knot holds?", ["reef", "none", "slip, wet", "air"], 0), ("Why?", ["a", "b", "c", "d"], 3)],
    "old_boats": [("What floats?", ["stone", "wood", "iron", "lead"], 1)],
}
MMLU_DEV = [(f"Example {n}?", ["one", "two", "three", "four"], n % 4) for n in range(5)]
WIKITEXT = (
    " \n = First ship = \n \n It sailed @-@ slowly , and sank . \n = = Later = = \n Rust . \n"
    " = Second = \n \n It floats . \n"
)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def csv_text(rows: list[tuple[str, list[str], int]]) -> str:
    def cell(text: str) -> str:
        return f'"{text}"' if "," in text else text

    lines = [",".join([cell(q), *map(cell, choices), str(answer)]) for q, choices, answer in rows]
    return "\n".join(["question,choice0,choice1,choice2,choice3,answer", *lines]) + "\n"


def write_task_data(folder: Path) -> Path:
    """Write data of every task that can run offline."""
    for name, rows in ROWS.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    with zipfile.ZipFile(folder / "BLiMP.zip", "w") as archive:
        for name, rows in BLIMP.items():
            archive.writestr(f"data/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        archive.writestr("__MACOSX/data/._plain.jsonl", b"\x00\xff")
        archive.writestr("data/.DS_Store", b"\x00")
    for subject, rows in MMLU.items():
        for split, content in (("test", rows), ("dev", MMLU_DEV)):
            path = folder / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(csv_text(content), "utf-8")
    (folder / "wikitext2_test.txt").write_text(WIKITEXT, "utf-8")
    (folder / "note.txt").write_text("A short text about nothing at all.", "utf-8")
    return folder
