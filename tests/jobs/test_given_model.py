"""What a job knows of the model it was given: its label and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from microscale.errors import ModelError, OptionError
from microscale.jobs.given_model import label_of, tokenizer_of
from small_models import LLAMA_6M


def test_the_label_is_where_a_model_lies_or_came_from() -> None:
    assert label_of("some/model") == label_of(Path("some/model")) == "some/model"
    model = nn.Linear(1, 1)
    assert label_of(model) == "Linear"
    model.name_or_path = "some/where"  # type: ignore[assignment]
    assert label_of(model) == "some/where"


def test_the_tokenizer_that_is_given_or_lies_beside_the_model(tmp_path: Path) -> None:
    given = object()
    assert tokenizer_of(LLAMA_6M, given) is given
    assert tokenizer_of(nn.Linear(1, 1), given) is given
    assert tokenizer_of(str(LLAMA_6M), None)("The sea")["input_ids"]
    with pytest.raises(OptionError, match="a loaded model needs tokenizer="):
        tokenizer_of(nn.Linear(1, 1), None)
    with pytest.raises(ModelError):
        tokenizer_of(tmp_path, None)
