"""Read calibration texts and chats: plain UTF-8 files and JSON lines.

Left out: directories and compressed files. Datasets by hub name are the integrations' matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from microscale.calibration.chats import Chat, chat_in
from microscale.errors import TextError

DEFAULT_FIELD = "text"
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")


def read_texts(path: str | Path, *, field: str = DEFAULT_FIELD) -> Iterator[str | Chat]:
    """Yield the texts of a file: one for each line of JSON lines (by the name's suffix), else the file as a whole.

    A line is an object whose ``field`` holds the text, or one with the messages of a chat. Blank lines and blank texts
    are passed over, and so is a byte order mark.

    Raises:
        TextError: absent, a directory, not UTF-8, empty; a line that is no JSON object or lacks the field, with its
            number.
    """
    source = Path(path)
    if source.is_dir():
        raise TextError(f"text {source} is a directory; give a text file or a file of JSON lines")
    if source.suffix not in JSON_LINES_SUFFIXES:
        yield read_text_file(source)
        return
    is_empty = True
    for text in _json_lines(source, field):
        if isinstance(text, Chat) or text.strip():
            is_empty = False
            yield text
    if is_empty:
        raise TextError(f"text {source} is empty; give a file with some text in it")


def read_text_file(path: str | Path) -> str:
    """Return the whole text of a UTF-8 file, without a byte order mark.

    Raises:
        TextError: it is absent, empty or not UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"text {path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise TextError(f"text {path} cannot be read: {error.strerror}") from None
    if not text or text.isspace():  # unlike strip(), no copy
        raise TextError(f"text {path} is empty; give a file with some text in it")
    return text


def checked_text(record: Any, field: str, where: str) -> str | Chat:
    """Return the text in a field of a record, or its chat; ``where`` says which record, for errors.

    A field that was named wins; without the usual one, messages are looked for.

    Raises:
        TextError: no object, no such field, or no text in it.
    """
    if not isinstance(record, dict):
        raise TextError(f"{where} must be an object like {{{field!r}: …}}, got {type(record).__name__}")
    fields = cast("dict[str, Any]", record)
    chat = chat_in(fields, where) if field == DEFAULT_FIELD and field not in fields else None
    if chat is not None:
        return chat
    if isinstance(fields.get(field), list) and (chat := chat_in(fields[field], f"field {field!r} of {where}")):
        return chat
    if field not in fields:
        names = ", ".join(map(repr, fields)) or "none"
        raise TextError(f"{where} has no field {field!r}; its fields are {names}: name the one that holds the text")
    if not isinstance(fields[field], str):
        raise TextError(f"field {field!r} of {where} must hold text, got {type(fields[field]).__name__}")
    return fields[field]


def _json_lines(path: Path, field: str) -> Iterator[str | Chat]:
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield checked_text(_parse_line(line, path, number), field, f"line {number} of {path}")
    except OSError as error:
        raise TextError(f"text {path} cannot be read: {error.strerror}") from None


def _parse_line(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise TextError(f"line {number} of {path} is not UTF-8 ({error.reason}); convert the file") from None
    except json.JSONDecodeError as error:
        raise TextError(
            f"line {number} of {path} is no JSON ({error.msg} at column {error.colno}); each line must be an object"
        ) from None
    except RecursionError:
        raise TextError(f"line {number} of {path} is nested too deeply to be read") from None
