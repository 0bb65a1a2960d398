"""Find and read the data files of tasks: plain, compressed or in a zip archive, never unpacked to disk.

A data folder is searched in itself, in its ``tasks`` and ``texts``, and in ``texts`` beside it. A wanted file may carry
a further ``.gz``, ``.bz2``, ``.xz`` or ``.zip``. Everything that is read is bounded in size, so that an archive that
unpacks to terabytes is an error and not a full memory.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from microscale.errors import TaskError

MAX_BYTES = 2**30
"""Largest content of one file: the known data sets have less than 50 MB."""

_OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {
    ".gz": cast(Any, gzip.open),
    ".bz2": cast(Any, bz2.open),
    ".xz": cast(Any, lzma.open),
}
_COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zip")
_READ_ERRORS = (
    OSError,
    EOFError,
    KeyError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFile:
    """The text of a file and where it came from, for messages."""

    where: str
    text: str


def data_roots(folder: Path) -> tuple[Path, ...]:
    """Return the folders that are searched, in order.

    Raises:
        TaskError: the data folder does not exist.
    """
    if not folder.is_dir():
        raise TaskError(f"task data {folder} is not a folder; give the one that holds the files of the tasks")
    candidates = (folder, folder / "tasks", folder / "texts", folder.resolve().parent / "texts")
    return tuple(path for path in candidates if path.is_dir())


def find_file(folder: Path, task: str, names: Sequence[str]) -> Path:
    """Return the first of several files (or folders) that exists, compressed or not.

    Raises:
        TaskError: none does; the message says which file was expected where.
    """
    for name in names:
        for root in data_roots(folder):
            for suffix in _COMPRESSED:
                path = root / f"{name}{suffix}"
                if path.exists():
                    return path
    wanted = " or ".join(names) or "no local file: this task comes from the hub alone"
    raise TaskError(
        f"task {task}: its data was not found in {folder}; expected {wanted} (also as .gz, .bz2, .xz, .zip)"
    )


def read_file(path: Path) -> TextFile:
    """Read a UTF-8 text file, decompressed by its suffix; of a zip archive the one file in it.

    Raises:
        TaskError: it cannot be read, is damaged, too large, not UTF-8, or an archive of several files.
    """
    if path.suffix == ".zip":
        names = archive_names(path, "")
        if len(names) != 1:
            raise TaskError(f"{path} must hold one file, got {len(names)}")
        return read_member(path, names[0])
    opener = _OPENERS.get(path.suffix)
    try:
        with path.open("rb") if opener is None else opener(path) as stream:
            content = stream.read(MAX_BYTES + 1)
    except _READ_ERRORS as error:
        raise TaskError(f"{path} cannot be read: {_reason(error)}; it may be truncated, fetch it again") from None
    return _decoded(content, str(path))


def archive_names(path: Path, suffix: str) -> list[str]:
    """Return the sorted names of the files in a zip archive or a folder that end as asked, without hidden ones.

    Raises:
        TaskError: it cannot be read or is no archive.
    """
    try:
        if path.is_dir():
            names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        else:
            with zipfile.ZipFile(path) as archive:
                names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except _READ_ERRORS as error:
        raise TaskError(f"{path} cannot be read as an archive: {_reason(error)}; fetch it again") from None
    visible = (name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))
    return sorted(name for name in visible if name.endswith(suffix))


def read_member(path: Path, name: str) -> TextFile:
    """Read one file of a zip archive or a folder.

    Raises:
        TaskError: as :func:`read_file`.
    """
    if path.is_dir():
        return read_file(path / name)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as stream:
            content = stream.read(MAX_BYTES + 1)
    except _READ_ERRORS as error:
        raise TaskError(f"{path}: {name} cannot be read: {_reason(error)}; fetch the archive again") from None
    return _decoded(content, f"{path}:{name}")


def _decoded(content: bytes, where: str) -> TextFile:
    if len(content) > MAX_BYTES:
        raise TaskError(f"{where} holds more than {MAX_BYTES} bytes; that is none of the known data sets")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{where} is not UTF-8 ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise TaskError(f"{where} is empty")
    return TextFile(where=where, text=text)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def json_lines(file: TextFile) -> list[tuple[str, dict[str, Any]]]:
    """Return (place, object) of each line of a JSONL file; empty lines are left out.

    Raises:
        TaskError: a line is no JSON object.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(file.text.split("\n"), start=1):
        if line.strip():
            where = f"{file.where}, line {number}"
            rows.append((where, _json_object(line, where)))
    return rows


def json_list(file: TextFile) -> list[tuple[str, dict[str, Any]]]:
    """Return (place, object) of each item of a JSON file that is one list.

    Raises:
        TaskError: it is no list of objects.
    """
    content = _json(file.text, file.where)
    if not isinstance(content, list):
        raise TaskError(f"{file.where} must hold one JSON list, got {type(content).__name__}")
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, item in enumerate(cast("list[Any]", content), start=1):
        where = f"{file.where}, item {number}"
        if not isinstance(item, dict):
            raise TaskError(f"{where} must be a JSON object, got {type(item).__name__}")
        rows.append((where, cast("dict[str, Any]", item)))
    return rows


def csv_rows(file: TextFile) -> list[tuple[str, list[str]]]:
    """Return (place, cells) of each row of a CSV file.

    Raises:
        TaskError: it is not CSV.
    """
    reader = csv.reader(io.StringIO(file.text, newline=""), strict=True)
    try:
        return [(f"{file.where}, line {reader.line_num}", row) for row in reader if row]
    except csv.Error as error:
        raise TaskError(f"{file.where}, line {reader.line_num}: not CSV: {error}") from None


def _json_object(text: str, where: str) -> dict[str, Any]:
    content = _json(text, where)
    if not isinstance(content, dict):
        raise TaskError(f"{where} must be a JSON object, got {type(content).__name__}")
    return cast("dict[str, Any]", content)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where} is not JSON: {error}") from None
