"""Errors: their relatives among the builtins, their texts, the check of kinds, and how a value is shown."""

from __future__ import annotations

import pytest
import torch

from microscale import errors
from microscale.errors import (
    ArgumentError,
    DependencyError,
    FormatError,
    FormatSpecError,
    MicroscaleError,
    RecipeError,
    check_kind,
    shown,
)

RELATIVES: dict[str, tuple[type[Exception], ...]] = {
    "FormatError": (ValueError,),
    "FormatSpecError": (FormatError, ValueError),
    "NonFiniteError": (ValueError,),
    "ShapeError": (ValueError,),
    "RowError": (IndexError,),
    "DtypeError": (TypeError,),
    "KernelError": (RuntimeError,),
    "DeviceError": (RuntimeError,),
    "LayoutError": (ValueError,),
    "CheckpointNotFoundError": (errors.CheckpointError, FileNotFoundError),
    "CheckpointWriteError": (errors.CheckpointError, OSError),
    "OptionError": (ValueError, TypeError),
    "RecipeError": (ValueError,),
    "TextError": (ValueError,),
    "CalibrationError": (ValueError,),
    "TaskError": (ValueError,),
    "StudyError": (ValueError,),
    "AllocationError": (ValueError,),
    "DependencyError": (ImportError,),
    "ArgumentError": (TypeError,),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_an_error_is_caught_as_a_python_programmer_expects(name: str) -> None:
    for relative in (MicroscaleError, *RELATIVES[name]):
        assert issubclass(getattr(errors, name), relative)


def test_every_error_is_one_of_ours_and_every_note_a_warning() -> None:
    found = [each for each in vars(errors).values() if isinstance(each, type) and each.__module__ == errors.__name__]
    assert len(found) > 20
    for each in found:
        is_note = each.__name__.endswith("Note")
        assert issubclass(each, UserWarning) if is_note else issubclass(each, MicroscaleError)


@pytest.mark.parametrize(("position", "pointer"), [(0, "^"), (7, "       ^")])
def test_a_spec_error_points_at_the_word(position: int, pointer: str) -> None:
    error = FormatSpecError("e2m1/32:e9", position, "no such scale", "write e8m0")
    expected = f"format 'e2m1/32:e9': no such scale\n  e2m1/32:e9\n  {pointer}\nwrite e8m0"
    assert str(error) == expected and (error.spec, error.position) == ("e2m1/32:e9", position)


def test_an_absent_library_comes_with_its_command() -> None:
    text = "drawing needs plotly, which is not installed; run: pip install plotly (part of microscale[plots])"
    assert str(DependencyError("plotly", "plots", "drawing")) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (7, "7 (int)"),
        (-0.0, "-0.0 (float)"),
        (True, "True (bool)"),
        ("x", "'x' (str)"),
        (b"\x00", "b'\\x00' (bytes)"),
        ([1], "[1] (list)"),
        ((), "() (tuple)"),
        ({"a": None}, "{'a': None} (dict)"),
        ("y" * 58, f"'{'y' * 58}' (str)"),  # with its quotes 60 signs, the longest that is shown
        ("y" * 59, "a value of type str"),
        (torch.ones(2), "a value of type Tensor"),
        (int, "a value of type type"),
    ],
    ids=repr,
)
def test_how_a_value_is_shown(value: object, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize(
    ("value", "kinds"),
    [(7, int), (True, bool), (True, (int, bool)), (None, (int, type(None))), ("a", str), (2, (int, float))],
)
def test_a_value_of_the_kind_is_taken(value: object, kinds: type | tuple[type, ...]) -> None:
    check_kind(value, kinds, "n", "anything")
    with pytest.raises(ArgumentError):
        check_kind(object(), kinds, "n", "anything")


@pytest.mark.parametrize(
    ("value", "kinds", "text"),
    [
        (True, int, "n must be a number, got True (bool)"),
        (False, (int, float), "n must be a number, got False (bool)"),
        (1, bool, "n must be a number, got 1 (int)"),
        (None, int, "n must be a number, got None"),
        ("1", int, "n must be a number, got '1' (str)"),
    ],
)
def test_a_value_of_another_kind_is_refused(value: object, kinds: type | tuple[type, ...], text: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        check_kind(value, kinds, "n", "a number")
    assert str(caught.value) == text and isinstance(caught.value, TypeError)
    with pytest.raises(RecipeError) as other:
        check_kind(value, kinds, "n", "a number", error=RecipeError)
    assert str(other.value) == text


def test_numbers_and_their_nouns() -> None:
    assert [errors.counted(n, "layer") for n in (0, 1, 2, 1234)] == ["0 layers", "1 layer", "2 layers", "1,234 layers"]
    assert errors.counted(2, "half", "halves") == "2 halves" and errors.counted(1, "half", "halves") == "1 half"


def test_the_nearest_word() -> None:
    assert errors.nearest("gptqq", ["rtn", "gptq"]) == "; did you mean gptq?"
    assert errors.nearest("PIQA", ["piqa"]) == "; did you mean piqa?"
    assert errors.nearest("zzz", ["rtn"]) == "" and errors.nearest(3, ["rtn"]) == ""
    assert errors.nearest("exclud", ["include", "exclude"], most=2) == "; did you mean exclude or include?"
