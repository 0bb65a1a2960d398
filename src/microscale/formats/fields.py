"""Check that the fields of a record hold what their annotations say."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from microscale.errors import FormatError, check_kind


def check_fields(record: object) -> None:
    """Refuse a record with a field of another kind than annotated; a whole number is a float, too.

    Raises:
        FormatError: naming the field, what it must be and what it is.
    """
    cls = type(record)
    for field, (kinds, items, expected) in _kinds(cls).items():
        name = f"{field} of a {cls.__name__}"
        value = getattr(record, field)
        check_kind(value, kinds, name, expected, error=FormatError)
        for item in value if items else ():
            check_kind(item, items, f"each of the {name}", _names(items), error=FormatError)


_Kinds = tuple[type, ...]


@functools.cache
def _kinds(cls: type[Any]) -> dict[str, tuple[_Kinds, _Kinds, str]]:
    """Return the kinds of each field, those of its items where it is a tuple, and the words for them."""
    hints = get_type_hints(cls)
    found: dict[str, tuple[_Kinds, _Kinds, str]] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if get_origin(hint) is tuple:
            found[field.name] = ((tuple,), _members(get_args(hint)[0]), "a tuple")
        else:
            kinds = _members(hint)
            found[field.name] = (kinds, (), _names(kinds))
    return found


def _members(hint: Any) -> _Kinds:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return (*kinds, int) if float in kinds else kinds


def _names(kinds: _Kinds) -> str:
    words = {int: "a whole number", float: "a number", bool: "True or False", types.NoneType: "None", str: "a text"}
    shown = [kind for kind in kinds if not (kind is int and float in kinds)]
    return " or ".join(words.get(kind, kind.__name__) for kind in shown)
