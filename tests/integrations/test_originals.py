"""A model as a user gives it: in memory, or by its place; nothing is read before it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from family_models import family_model
from microscale.errors import CheckpointNotFoundError, ModelError
from microscale.integrations.originals import Original
from small_models import save_random_model


@pytest.mark.parametrize("given", [None, 7, nn.Linear(2, 2), {"model": 1}])
def test_what_is_no_model(given: Any) -> None:
    with pytest.raises(ModelError, match=rf"got {type(given).__name__}\. Single tensors: microscale\.quantize_tensor"):
        Original(given)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        Original(tmp_path / "absent")


def test_a_model_in_memory_is_given_back() -> None:
    model = family_model("llama")
    original = Original(model)
    assert original.whole() is model and original.outline() is model and original.path is None
    assert original.layers(part="language") is None and original.tokenizer() is None
    before = original.identity()
    assert before == original.identity()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert original.identity() != before, "another number is another model"


def test_a_model_by_its_place(tmp_path: Path) -> None:
    path = save_random_model(tmp_path / "model")
    original = Original(str(path))
    assert str(original) == str(path)
    outline: Any = original.outline()
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert not any(parameter.is_meta for parameter in original.whole().parameters())
    tokenizer = original.tokenizer()
    assert tokenizer is not None and original.tokenizer() is tokenizer, "it is loaded once"
    other: Any = object()
    assert Original(path, tokenizer=other).tokenizer() is other
    before = original.identity()
    save_random_model(tmp_path / "model", seed=1)
    assert original.identity() != before
