"""An option of a job, written once: its name, type, default, help, flag and limits stand at one field of a record.

A job takes one record, a frozen dataclass that derives from :class:`Options`. A field that a user can give is annotated
with an :class:`Option`; a field that is another such record brings that record's options with it::

    @dataclass(frozen=True, slots=True, kw_only=True)
    class GenerateOptions(Options):
        prompt: Annotated[str, Option(help="Text to continue.", place=Place.ARGUMENT)]
        max_new_tokens: Annotated[int, Option(help="Tokens to generate.", short="-n", minimum=1)] = 64

From this the command line makes its parameters (:mod:`microscale.cli.parameters`), and Python its keywords
(:func:`record_from`). This module and the records import neither torch nor a room that does: the command line shows its
help at once.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from microscale.errors import OptionError, is_path, nearest, shown

R = TypeVar("R", bound="Options")


class Place(Enum):
    """Where the command line takes an option from."""

    FLAG = "flag"
    """A flag that may be left out."""
    REQUIRED = "required"
    """A flag that the command line needs, also where Python does not."""
    ARGUMENT = "argument"
    """A word without a flag; in Python a positional argument."""
    PYTHON = "python"
    """Nowhere: what only Python can give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a value is where its type says too little: in words, and whether a value is one."""

    expected: str
    takes: Callable[[Any], bool]


def _is_object(value: Any, *methods: str) -> bool:
    """Whether a value is no class and has some methods; without importing what it would be an instance of."""
    return not isinstance(value, type) and all(callable(getattr(value, method, None)) for method in methods)


def _is_model(value: Any) -> bool:
    if isinstance(value, str | Path):
        return is_path(value)
    return _is_object(value, "__call__", "named_modules") and hasattr(value, "config")


WORD = Kind(
    expected="a word (or words, or a record made of them)",
    takes=lambda value: not hasattr(value, "__array__") and not isinstance(value, bool | int | float | bytes),
)
MODEL = Kind(expected="a directory or hub name (str or Path), or a loaded model of transformers", takes=_is_model)
TOKENIZER = Kind(
    expected="a loaded tokenizer, such as microscale.load_tokenizer(PATH) returns",
    takes=lambda value: _is_object(value, "__call__", "decode"),
)
FREE_TEXT = Kind(expected="a text", takes=lambda value: isinstance(value, str))
"""A text that may also be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What is said of a field beside its name, type and default.

    ``word`` is its name for users where that is not the field's, ``flag`` its long flag where that is not ``--word``,
    ``command_type`` its type on the command line where Python takes more, ``kind`` what its type does not say.
    """

    help: str = ""
    short: str | None = None
    word: str | None = None
    flag: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    place: Place = Place.FLAG
    command_type: Any = None
    kind: Kind | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedOption:
    """An option of a record: its word, type and default (``dataclasses.MISSING`` where it must be given)."""

    word: str
    type: Any
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """The long flag of the command line."""
        return self.option.flag or f"--{self.word.replace('_', '-')}"


class Options:
    """The base of all records of options: a record checks its own values when it is made.

    A path may be given as text and becomes a ``Path``; a list becomes a tuple. No text is empty or holds NUL.

    Raises:
        OptionError: a value of another kind than the field's, or outside its limits.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, named, _ in _fields(type(self)):
            if named is not None:
                object.__setattr__(self, name, _checked(named, getattr(self, name)))


@functools.cache
def _fields(record: type[Options]) -> tuple[tuple[str, NamedOption | None, type[Options] | None], ...]:
    """Return the fields of a record: each an option, a record of its own, or neither."""
    hints = get_type_hints(record, include_extras=True)
    found: list[tuple[str, NamedOption | None, type[Options] | None]] = []
    for field in dataclasses.fields(cast(Any, record)):
        hint = hints[field.name]
        said = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Option)]
        named = None
        if get_origin(hint) is Annotated and said:
            word = said[0].word or field.name
            named = NamedOption(word=word, type=get_args(hint)[0], default=_default(field), option=said[0])
        nested = hint if isinstance(hint, type) and issubclass(hint, Options) else None
        found.append((field.name, named, nested))
    return tuple(found)


@functools.cache
def options_of(record: type[Options]) -> tuple[NamedOption, ...]:
    """Return all options of a record, those of the records in it included, in the order of their fields.

    What a record in it sets otherwise by default is that record's value in the field's default.
    """
    found: list[NamedOption] = []
    defaults = {field.name: _default(field) for field in dataclasses.fields(cast(Any, record))}
    for name, named, nested in _fields(record):
        if named is not None:
            found.append(named)
        elif nested is not None:
            found += [_with_default(one, nested, defaults[name]) for one in options_of(nested)]
    return tuple(found)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _with_default(one: NamedOption, nested: type[Options], default: object) -> NamedOption:
    names = {named.word: name for name, named, _ in _fields(nested) if named is not None}
    if not isinstance(default, Options) or one.word not in names:
        return one
    return dataclasses.replace(one, default=getattr(default, names[one.word]))


def given_words(options: Options) -> dict[str, Any]:
    """Return the values of a record that are not its defaults, by word; records in it play no part."""
    found = [(named, getattr(options, name)) for name, named, _ in _fields(type(options)) if named is not None]
    return {named.word: value for named, value in found if value is not named.default and value != named.default}


def record_from(record: type[R], words: Mapping[str, Any]) -> R:
    """Return the record of what a user gave by word; what was not given has its default.

    Raises:
        OptionError: a word that no option has, one that is missing, or a value that an option refuses.
    """
    options = {one.word: one for one in options_of(record)}
    for word in words:
        if word not in options:
            hint = nearest(word, options, most=3) or "."
            raise OptionError(f"there is no option {word!r}{hint} Possible: {', '.join(options)}")
    missing = [word for word, one in options.items() if one.default is MISSING and word not in words]
    if missing:
        raise OptionError(f"{missing[0]} must be given: {options[missing[0]].option.help}")
    return _made(record, words)


def _made(record: type[R], words: Mapping[str, Any]) -> R:
    values: dict[str, Any] = {}
    for name, named, nested in _fields(record):
        if named is not None and named.word in words:
            values[name] = words[named.word]
        elif nested is not None:
            given = {one.word: one.default for one in options_of(record) if one.default is not MISSING} | dict(words)
            values[name] = _made(nested, given)
    return record(**values)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_texts(kind: Any) -> bool:
    """Whether a type is a list of texts."""
    return get_origin(kind) in (tuple, Sequence) and get_args(kind)[:1] == (str,)


def is_function(kind: Any) -> bool:
    """Whether a type is that of a function."""
    return get_origin(kind) is Callable


def _checked(named: NamedOption, value: Any) -> Any:
    """Return a value in the form that the record holds."""
    kinds, kind = kinds_of(named.type), named.option.kind
    if value is None and (type(None) in kinds or (named.default is None and Any in kinds)):
        return value
    if kind is not None and not kind.takes(value):
        raise OptionError(f"{named.word} is {kind.expected}, got {shown(value)}")
    if kind is not FREE_TEXT and isinstance(value, str | Path) and not is_path(value):
        raise OptionError(f"{named.word} is {_expected(kinds, named.option)}, not empty and without NUL, got {value!r}")
    if Any in kinds:
        return value
    for member in kinds:
        if is_texts(member) and isinstance(value, list | tuple) and all(_is_text(text) for text in value):
            return tuple(value)
        if member is Path and str not in kinds and isinstance(value, str):
            return Path(value)
        if is_function(member) and callable(value):
            return value
        if isinstance(member, type) and _is_of(member, value) and _is_inside(named.option, value):
            return value
    raise OptionError(f"{named.word} is {_expected(kinds, named.option)}, got {shown(value)}{_size_hint(value)}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and is_path(value)


def _is_of(kind: type, value: object) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _is_inside(option: Option, value: Any) -> bool:
    """Whether a number lies within the limits; NaN does not, nor does a whole number of more than 63 bits."""
    if _size_hint(value):
        return False
    return (option.minimum is None or value >= option.minimum) and (option.maximum is None or value <= option.maximum)


def _size_hint(value: object) -> str:
    return "; whole numbers have at most 63 bits" if isinstance(value, int) and value.bit_length() > 63 else ""


def _expected(kinds: Sequence[Any], option: Option) -> str:
    """Return what a value may be, in words."""
    if option.kind is not None:
        return option.kind.expected
    limits = "" if option.minimum is None else f" from {option.minimum:g}"
    if option.minimum is not None:
        limits += " on" if option.maximum is None or option.maximum > 2**53 else f" to {option.maximum:g}"
    words = {
        int: f"a whole number{limits}",
        float: f"a number{limits}",
        bool: "True or False",
        str: "a text",
        Path: "a path (str or Path)",
    }
    found = [words[kind] for kind in kinds if kind in words]
    found += ["a list of texts, such as ['*.down_proj']" for kind in kinds if is_texts(kind)]
    found += ["a function" for kind in kinds if is_function(kind)]
    return " or ".join(found) or "a text"
