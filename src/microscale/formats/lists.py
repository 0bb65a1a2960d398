"""Split text at separators that stand outside of parentheses: specs hold commas and colons in their arguments."""

from __future__ import annotations

from microscale.errors import check_kind


def split_outside(text: str, separator: str) -> list[tuple[int, str]]:
    """Return the pieces between separators, each with its offset."""
    check_kind(text, str, "what is to be split", "a text")
    check_kind(separator, str, "a separator", "a text")
    pieces: list[tuple[int, str]] = []
    depth, begin = 0, 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == separator and depth == 0:
            pieces.append((begin, text[begin:position]))
            begin = position + 1
    pieces.append((begin, text[begin:]))
    return pieces


def list_items(text: str) -> list[str]:
    """Return the items of a list with commas, without spaces around them and without empty ones."""
    return [piece.strip() for _, piece in split_outside(text, ",") if piece.strip()]
