"""Fields of a record against their annotations, on a record of every kind of annotation that formats have."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import pytest

from microscale.errors import FormatError
from microscale.formats.fields import check_fields


class Colour(Enum):
    """Two words."""

    RED = "red"


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A record in a record."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One field of each kind; checked when it is made."""

    count: int = 1
    share: float = 0.5
    flag: bool = True
    word: str = "x"
    colour: Colour = Colour.RED
    inner: Inner | None = None
    many: tuple[float, ...] = ()
    either: tuple[Inner | Colour, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    "fields",
    [
        {"share": 1},  # a whole number is a number
        {"inner": Inner()},
        {"many": (1, 2.5)},
        {"either": (Inner(), Colour.RED)},
        {"count": -3, "flag": False, "word": ""},
    ],
)
def test_fields_of_their_kind(fields: dict[str, Any]) -> None:
    made = Sample(**fields)
    assert {name: getattr(made, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("count", 1.0, "count of a Sample must be a whole number, got 1.0 (float)"),
        ("count", True, "count of a Sample must be a whole number, got True (bool)"),
        ("count", np.int64(1), "count of a Sample must be a whole number, got a value of type int64"),
        ("share", "1", "share of a Sample must be a number, got '1' (str)"),
        ("share", False, "share of a Sample must be a number, got False (bool)"),
        ("flag", 1, "flag of a Sample must be True or False, got 1 (int)"),
        ("flag", None, "flag of a Sample must be True or False, got None"),
        ("word", b"x", "word of a Sample must be a text, got b'x' (bytes)"),
        ("colour", "red", "colour of a Sample must be Colour, got 'red' (str)"),
        ("inner", Colour.RED, "inner of a Sample must be Inner or None, got a value of type Colour"),
        ("many", [1.0], "many of a Sample must be a tuple, got [1.0] (list)"),
        ("many", (1.0, "2"), "each of the many of a Sample must be a number, got '2' (str)"),
        ("many", (True,), "each of the many of a Sample must be a number, got True (bool)"),
        ("either", (Inner(), 1), "each of the either of a Sample must be Inner or Colour, got 1 (int)"),
    ],
)
def test_fields_of_another_kind(field: str, value: Any, text: str) -> None:
    with pytest.raises(FormatError, match=f"^{re.escape(text)}$"):
        replace(Sample(), **{field: value})
