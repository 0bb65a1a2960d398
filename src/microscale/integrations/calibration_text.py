"""Calibration texts from a file or, through the ``datasets`` library, from a hub dataset by name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from microscale.calibration.chats import Chat
from microscale.calibration.texts import DEFAULT_FIELD, JSON_LINES_SUFFIXES, checked_text, read_texts
from microscale.errors import DependencyError, TextError, counted
from microscale.integrations.hub import offline_where_unreachable

DEFAULT_SPLIT = "train"
LONGEST_NAME = 1024
"""Characters of a path or a name; what is longer is a text that was given in place of one."""
_LIBRARY_ERRORS = (OSError, ValueError, TypeError, RuntimeError, LookupError, AttributeError, ImportError)


def read_calibration(
    source: str | Path | Sequence[str | Chat], *, field: str = DEFAULT_FIELD, split: str = DEFAULT_SPLIT
) -> Iterator[str | Chat]:
    """Yield the texts and chats of a file (plain or JSON lines) or of a dataset ``NAME[:CONFIG]``, which is streamed.

    An existing file always wins over a dataset of the same name. A sequence holds the texts or chats themselves; blank
    ones are passed over, as they are in files.

    Raises:
        TextError: at the first text, unless a later line is broken: see :func:`read_texts`; a dataset that cannot be
            loaded or has no such field, or no text at all.
        DependencyError: a dataset is named and the library is not installed.
    """
    if not isinstance(source, str | Path):
        return _given_texts(source)
    if len(str(source)) > LONGEST_NAME or "\n" in str(source):
        raise TextError(
            f"calibration names a file or a dataset, but {str(source)[:40]!r}… ({len(str(source)):,} characters) looks"
            " like a text itself; in Python give texts as a list: calibration=[text]"
        )
    if Path(source).exists() or looks_like_file(source):
        return read_texts(source, field=field)
    return _dataset_texts(str(source), field, split)


def _given_texts(source: Sequence[str | Chat]) -> Iterator[str | Chat]:
    texts = [text for text in source if isinstance(text, Chat) or text.strip()]
    if not texts:
        raise TextError(f"the {counted(len(source), 'calibration text')} are blank; give some text")
    return iter(texts)


def looks_like_file(source: str | Path) -> bool:
    """Return whether a source that does not exist was meant as a file: by a path's first letter, depth or suffix."""
    text = str(source)
    is_path = isinstance(source, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1 or not text
    return is_path or Path(text).suffix in {".txt", ".text", ".md", *JSON_LINES_SUFFIXES}


def _dataset_texts(source: str, field: str, split: str) -> Iterator[str | Chat]:
    try:
        library: Any = importlib.import_module("datasets")
    except ImportError:
        purpose = f"reading the dataset {source!r} (no file of that name exists)"
        raise DependencyError("datasets", extra="datasets", purpose=purpose) from None
    name, _, config = source.partition(":")
    try:
        with offline_where_unreachable():
            rows = iter(library.load_dataset(name, config or None, split=split, streaming=True))
    except _LIBRARY_ERRORS as error:
        raise TextError(
            f"{source!r} is no file, and no dataset of that name can be loaded (split {split!r}): {error}"
        ) from error
    is_empty = True
    for number, row in enumerate(_guarded(rows, source), start=1):
        text = checked_text(row, field, f"row {number} of dataset {source!r}")
        if isinstance(text, Chat) or text.strip():
            is_empty = False
            yield text
    if is_empty:
        raise TextError(f"split {split!r} of dataset {source!r} holds no text; choose another split")


def _guarded(rows: Iterator[Any], source: str) -> Iterator[Any]:
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except _LIBRARY_ERRORS as error:
            raise TextError(f"dataset {source!r} broke off: {error}") from error
        yield row
