"""Lists in words: separators count outside of parentheses alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microscale.errors import ArgumentError
from microscale.formats.lists import list_items, split_outside


@pytest.mark.parametrize(
    ("text", "separator", "pieces"),
    [
        ("", ":", [(0, "")]),
        ("a", ":", [(0, "a")]),
        ("a:b", ":", [(0, "a"), (2, "b")]),
        (":", ":", [(0, ""), (1, "")]),
        ("a:mse(-1,1):b", ":", [(0, "a"), (2, "mse(-1,1)"), (12, "b")]),
        ("pair(a,b(c,d)),e", ",", [(0, "pair(a,b(c,d))"), (15, "e")]),
        ("a(b,c", ",", [(0, "a(b,c")]),  # never closed: nothing after it is outside
        ("a),b", ",", [(0, "a),b")]),  # closed too often: the depth is not 0 either
    ],
)
def test_pieces_and_their_places(text: str, separator: str, pieces: list[tuple[int, str]]) -> None:
    assert split_outside(text, separator) == pieces


@given(text=st.text(alphabet="ab(),: ", max_size=30), separator=st.sampled_from([",", ":"]))
def test_pieces_and_separators_are_the_text(text: str, separator: str) -> None:
    pieces = split_outside(text, separator)
    assert separator.join(piece for _, piece in pieces) == text
    assert all(text[start : start + len(piece)] == piece for start, piece in pieces)
    assert len(pieces) - 1 <= text.count(separator)


@given(text=st.text(alphabet="ab, ", max_size=30))
def test_without_parentheses_it_is_the_split_of_python(text: str) -> None:
    assert [piece for _, piece in split_outside(text, ",")] == text.split(",")


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("", []),
        (" , ,", []),
        ("a,b", ["a", "b"]),
        (" a , b(c, d) ,", ["a", "b(c, d)"]),
    ],
)
def test_items(text: str, items: list[str]) -> None:
    assert list_items(text) == items


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(ArgumentError, match="what is to be split must be a text, got None"):
        split_outside(None, ",")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"a separator must be a text, got 3 \(int\)"):
        split_outside("a", 3)  # type: ignore[arg-type]
