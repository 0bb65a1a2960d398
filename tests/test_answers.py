"""The newcomer's questions in docs/architecture.md: the files of each exist, are at most two, and hold the words."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from microscale.algorithms.registry import STEPS

REPO_ROOT = Path(__file__).resolve().parents[1]
SECTION = (
    (REPO_ROOT / "docs" / "architecture.md").read_text("utf-8").split("## Where is the answer")[1].split("\n## ")[0]
)
ROWS = re.findall(r"^\| ([^|]+\?) \| ([^|]+) \| `([^|]+)` \|$", SECTION, flags=re.MULTILINE)


def test_ten_questions() -> None:
    assert len(ROWS) == SECTION.count("? |") == 10


@pytest.mark.parametrize(("question", "files", "words"), ROWS, ids=[row[0] for row in ROWS])
def test_the_files_hold_the_words(question: str, files: str, words: str) -> None:
    names = re.findall(r"`([^`]+)`", files)
    assert 1 <= len(names) <= 2, question
    for name in names:
        assert words in (REPO_ROOT / name).read_text("utf-8"), f"{name} does not say {words!r}"


@pytest.mark.parametrize("name", STEPS)
def test_every_method_names_its_source(name: str) -> None:
    assert "Source:" in (sys.modules[STEPS[name].__module__].__doc__ or ""), name
