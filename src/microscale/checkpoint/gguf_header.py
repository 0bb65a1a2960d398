"""The header of a GGUF file: metadata and where each tensor lies, read with every length checked against the file.

Why not the reader of the gguf library: it trusts the lengths in the file (an array that claims 2^60 numbers keeps it
busy forever), and files of MXFP4 and floats can be read without the library.

Layout (versions 2 and 3, little-endian): magic, version, tensor count, metadata count; the metadata as key, type,
value; for each tensor name, dimensions (fastest first), type, offset; then, aligned, the data.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microscale.errors import CheckpointError, CheckpointNotFoundError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufEntry:
    """One tensor of a GGUF file: ``shape`` ends in [rows, cols] as in torch, ``offset`` is one in the file."""

    name: str
    type_id: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """Metadata by key (numbers, strings, booleans and lists of them), tensors by name, and the size of the file."""

    metadata: Mapping[str, Any]
    entries: Mapping[str, GgufEntry]
    num_bytes: int


def read_header(path: str | Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: not a GGUF file, one of another version or byte order, or a truncated or damaged one.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise CheckpointError(f"{path} is empty; download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path))
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{path} does not exist; give the path of a GGUF file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


class _Cursor:
    """Reads numbers and strings one after the other and refuses to go past the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem} (at byte {self.position}); the file is damaged or truncated")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise self.error(f"{count} more bytes are announced than the file has")
        self.position += count
        return self.data[self.position - count : self.position]

    def numbers(self, letter: str, count: int) -> tuple[Any, ...]:
        # "<" also switches padding off; the bytes are taken first so that a huge count cannot build a huge format.
        raw = self.take(count * struct.calcsize(f"<{letter}"))
        return struct.unpack(f"<{count}{letter}", raw)

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error("a string is not UTF-8") from None


def _parse(cursor: _Cursor) -> GgufHeader:
    magic = cursor.take(min(4, len(cursor.data)))
    if magic != MAGIC:
        raise CheckpointError(f"{cursor.path} is not a GGUF file: it starts with {magic!r}, expected {MAGIC!r}")
    version = cursor.number("I")
    if version not in VERSIONS:
        remedy = "convert it again with a current llama.cpp"
        if version & 0xFFFF == 0:
            remedy = "it was written for big-endian machines; " + remedy
        raise CheckpointError(f"{cursor.path} is GGUF version {version}, microscale reads {VERSIONS}; {remedy}")
    num_tensors, num_keys = cursor.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise cursor.error(f"the key {key!r} stands twice in the metadata")
        metadata[key] = _value(cursor, cursor.number("I"))
    raw = [_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment must be a power of two, got {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    entries: dict[str, GgufEntry] = {}
    for name, type_id, shape, offset in raw:
        if name in entries:
            raise cursor.error(f"tensor {name!r} stands twice in the file")
        if offset % alignment:
            raise cursor.error(f"tensor {name!r} starts at offset {offset}, not a multiple of {alignment}")
        entries[name] = GgufEntry(name=name, type_id=type_id, shape=shape, offset=start + offset)
    return GgufHeader(metadata=metadata, entries=entries, num_bytes=len(cursor.data))


def _value(cursor: _Cursor, type_id: int) -> Any:
    if type_id in _SCALARS:
        return cursor.number(_SCALARS[type_id])
    if type_id == _STRING:
        return cursor.string()
    if type_id != _ARRAY:
        raise cursor.error(f"the metadata holds a value of the unknown type {type_id}")
    item_type, count = cursor.number("I"), cursor.number("Q")
    if item_type in _SCALARS:
        return list(cursor.numbers(_SCALARS[item_type], count))
    if item_type == _STRING:
        return [cursor.string() for _ in range(count)]
    raise cursor.error(f"the metadata holds an array of the unknown type {item_type}")


def _entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name, num_dims = cursor.string(), cursor.number("I")
    if not 1 <= num_dims <= MAX_DIMENSIONS:
        raise cursor.error(f"tensor {name!r} has {num_dims} dimensions, possible are 1 to {MAX_DIMENSIONS}")
    dims = cursor.numbers("Q", num_dims)
    if 0 in dims:
        raise cursor.error(f"tensor {name!r} has the shape {list(dims)} and so no elements")
    return name, cursor.number("I"), tuple(int(length) for length in reversed(dims)), cursor.number("Q")
