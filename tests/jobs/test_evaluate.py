"""The job ``evaluate`` in Python: by path or in memory, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from command_line import succeed
from microscale.errors import OptionError, TaskError
from microscale.jobs.evaluate_options import EvaluateOptions
from microscale.jobs.printing import json_value
from microscale.nn.attention_setting import model_attention
from microscale.planning.executed import linear_words
from small_models import save_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 3)
    return path


def without_seconds(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "seconds"}


def test_python_and_the_command_line_say_the_same_words(model: Path, text: Path) -> None:
    found = microscale.evaluate(str(model), text=text, window=32, reference=model, layers=True)
    options = ("--text", text, "--window", "32", "--reference", model, "--layers", "--json")
    assert without_seconds(json_value(found)) == without_seconds(succeed("eval", model, *options).json)


def test_a_loaded_model_is_scored_as_its_file(model: Path, text: Path) -> None:
    """It computes in its own dtype, and its attention is rounded as before afterwards."""
    loaded, tokenizer = microscale.load(model, dtype=torch.float32), microscale.load_tokenizer(model)
    words = {"text": text, "window": 32, "attention": "mxfp4"}
    found = microscale.evaluate(loaded, tokenizer=tokenizer, **words)
    assert without_seconds(json_value(found)) == without_seconds(json_value(microscale.evaluate(model, **words)))
    assert not model_attention(loaded)
    narrow = microscale.evaluate(microscale.load(model, dtype=torch.bfloat16), tokenizer=tokenizer, **words)
    assert narrow.on_text is not None and found.on_text is not None
    assert narrow.dtype == "bfloat16" and narrow.on_text.score.perplexity != found.on_text.score.perplexity
    with pytest.raises(OptionError, match="needs tokenizer="):
        microscale.evaluate(loaded, text=text)


def test_what_ran_is_counted(model: Path, text: Path, tmp_path: Path) -> None:
    """Four windows in two batches through 14 packed layers; the reference has none."""
    microscale.save(microscale.quantize(model, "mxfp4"), tmp_path / "out", tokenizer=microscale.load_tokenizer(model))
    words = {"text": text, "window": 32, "tokens": 4 * 31, "batch": 2}
    found = microscale.evaluate(tmp_path / "out", reference=model, **words)
    assert sum(found.executed["linear"].values()) == 28
    assert json_value(found)["executed"] == found.executed
    assert "linear" not in microscale.evaluate(model, **words).executed
    shown = succeed("eval", tmp_path / "out", "--text", text, "--window", "32", "--batch", "6").stdout
    assert f"executed: {linear_words({'linear': {next(iter(found.executed['linear'])): 28}})}" in shown


def test_losses_that_are_not_finite_are_a_note(model: Path, text: Path) -> None:
    loaded = microscale.load(model, dtype=torch.float32)
    loaded.lm_head.weight.data[:] = float("nan")
    with pytest.warns(microscale.errors.QuantizationNote, match="losses are not finite"):
        microscale.evaluate(loaded, tokenizer=microscale.load_tokenizer(model), text=text, window=32)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({}, "nothing to score"),
        ({"text": "a.txt", "layers": True}, "--layers compares with a reference"),
        ({"tasks": "piqa", "reference": "b"}, "--reference compares on a text"),
        ({"text": "a.txt", "batch": 0}, "batch is a whole number from 1 on"),
    ],
)
def test_options_that_do_not_go_together(words: dict[str, Any], problem: str) -> None:
    """They are refused before anything is read."""
    with pytest.raises(OptionError, match=problem):
        microscale.evaluate("absent", **words)


def test_tasks_are_a_list_or_one_text(tmp_path: Path) -> None:
    for tasks in ("piqa, nonsense", ["piqa", "nonsense"]):
        with pytest.raises(TaskError, match="nonsense"):
            microscale.evaluate("absent", tasks=tasks, task_data=tmp_path)
    with pytest.raises(TaskError, match="no task was asked for"):
        microscale.evaluate("absent", tasks=" , ")


def test_the_defaults_are_those_of_the_protocol() -> None:
    from microscale.evaluation.perplexity import DEFAULT_WINDOW

    assert EvaluateOptions(model="m").window == DEFAULT_WINDOW
