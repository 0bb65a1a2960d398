"""The tiny model that planning measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from small_models import save_random_model


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers on disk, in bfloat16."""
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def model(path: Path) -> Any:
    """The same in float32, fresh for each test."""
    return microscale.load(path, dtype=torch.float32)
