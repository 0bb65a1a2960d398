"""A study and an empty results file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_studies import TEXT
from microscale.studies.file import Study, load_study
from microscale.studies.store import StudyStore


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "s.yaml").write_text(TEXT)
    return load_study(tmp_path / "s.yaml")


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    return StudyStore(tmp_path / "s.sqlite")
