"""The job ``analyze`` in Python."""

from __future__ import annotations

from pathlib import Path

import pytest

import microscale
from command_line import succeed
from microscale.errors import CalibrationError
from microscale.jobs.printing import json_value
from microscale.jobs.small_options import AnalyzeOptions
from microscale.planning.recommendation import DEFAULT_TARGET_DB
from small_models import save_random_model


def test_python_and_the_command_line_say_the_same_words(tmp_path: Path) -> None:
    model, text = save_random_model(tmp_path / "tiny"), tmp_path / "book.txt"
    text.write_text("The harbour was quiet. " * 60)
    found = microscale.analyze(
        str(model), calibration=text, formats="mxfp4,mxfp8", samples=2, window=32, output=tmp_path / "python.html"
    )
    options = ("--calibration", text, "-f", "mxfp4,mxfp8", "--samples", "2", "--window", "32", "--json")
    shown = succeed("analyze", model, *options).json
    said = json_value(found)
    assert said | {"seconds": 0} == shown | {"seconds": 0}
    assert "tiny: analysis of numbers" in (tmp_path / "python.html").read_text()


def test_a_text_is_needed() -> None:
    with pytest.raises(CalibrationError, match="give --calibration FILE"):
        microscale.analyze("absent")


def test_a_look_at_a_model_needs_less_text_than_a_calibration() -> None:
    options = AnalyzeOptions(model="m")
    assert (options.calibration.samples, options.calibration.window) == (8, 512)
    assert options.target == DEFAULT_TARGET_DB
