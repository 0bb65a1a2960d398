"""Atomic writing: a checkpoint directory appears whole or not at all.

Everything goes into a directory with a temporary name beside the target, which is renamed when it is complete.
An interruption, an error or a full disk leaves the target as it was and no half-written files.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from microscale.errors import CheckpointWriteError


def write_directory(target: str | Path, fill: Callable[[Path], None], *, overwrite: bool = False) -> Path:
    """Create ``target`` with what ``fill`` writes into the directory that it is given.

    ``overwrite`` replaces an existing directory, but only one that holds a config.json or nothing at all: this is
    no way to delete something else by mistake.

    Raises:
        CheckpointWriteError: the target exists, or writing failed (the message says why).
    """
    path = Path(target)
    check_target(path, overwrite=overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as error:
        raise CheckpointWriteError(f"cannot write to {path.parent}: {error}") from None
    try:
        fill(partial)
        _open_to_readers(partial)
        _sync(partial)
        _replace(partial, path)
    except CheckpointWriteError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointWriteError(
            f"writing {path} failed: {error}; nothing was left there. Free some space or choose another place with -o"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with two blanks of indentation and a newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_text_target(target: str | Path) -> None:
    """Refuse a text file that could not be written, before the work that it is to hold.

    Raises:
        CheckpointWriteError: the path is a directory.
    """
    if Path(target).is_dir():
        raise CheckpointWriteError(f"{target} is a directory; name a file to write, such as {Path(target) / 'out'}")


def write_text_file(target: str | Path, text: str) -> Path:
    """Write a text file under a temporary name and rename it.

    Raises:
        CheckpointWriteError: writing failed; an old file is still whole.
    """
    path = Path(target)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise CheckpointWriteError(f"writing {path} failed: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_target(target: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a target that :func:`write_directory` would refuse, before any work is done.

    Raises:
        CheckpointWriteError: it exists and is not to be overwritten.
    """
    path = Path(target)
    try:
        if not path.exists():
            return
        if not path.is_dir():
            raise CheckpointWriteError(f"{path} exists and is not a directory; choose another place with -o")
        entries = {entry.name for entry in path.iterdir()}
    except CheckpointWriteError:
        raise
    except OSError as error:
        raise CheckpointWriteError(f"cannot write to {path}: {error}") from None
    if not entries:
        return
    if not overwrite:
        raise CheckpointWriteError(
            f"{path} exists already; choose another place, or say --overwrite (overwrite=True in Python)"
        )
    if "config.json" not in entries:
        raise CheckpointWriteError(f"{path} holds no model (no config.json), so it is not overwritten")


def _open_to_readers(directory: Path) -> None:
    """Give a temporary directory and its files the modes of new ones: libraries write some for the owner alone."""
    probe = directory / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    directory.chmod(mode | (mode & 0o444) >> 2)
    for entry in directory.rglob("*"):
        entry.chmod(mode | (mode & 0o444) >> 2 if entry.is_dir() else mode)


def _sync(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _replace(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    kept = retired / path.name
    try:
        path.rename(kept)
        partial.rename(path)
    finally:
        if kept.exists() and not path.exists():
            _put_back(kept, path)
        shutil.rmtree(retired, ignore_errors=True)


def _put_back(kept: Path, path: Path) -> None:
    try:
        kept.rename(path)
    except OSError as error:
        raise CheckpointWriteError(f"writing {path} failed; what was there lies in {kept} now: {error}") from None
