"""Random models for the tests of recipes, written once for each module of tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import microscale
from small_models import save_random_model


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function from a family to a fresh random model."""
    folder = tmp_path_factory.mktemp("models")

    def make(family: str = "llama", **changes: Any) -> Any:
        path = folder / f"{family} {changes}"
        if not path.exists():
            save_random_model(path, family, **changes)
        return microscale.load(path)

    return make
