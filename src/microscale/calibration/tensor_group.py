"""Named tensors that are complete or not at all: in memory, or in a folder with a manifest that proves them.

A folder holds one file of raw bytes for each tensor and, once :meth:`finish` was called, a ``manifest.json`` with the
job's hash, every tensor's dtype, shape and digest, and a digest of itself. A folder without a manifest that fits
counts as absent; a file whose digest does not fit is never returned.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from microscale.errors import CalibrationError
from microscale.formats.dtypes import dtype_name

MANIFEST = "manifest.json"
_VERSION = 1


class TensorGroup(Protocol):
    """Tensors by name, and a note (anything that JSON can say) about them."""

    def put(self, name: str, tensor: Tensor) -> None:
        """Add or replace a tensor; a finished group is unfinished again."""
        ...

    def finish(self, note: Any = None) -> None:
        """Declare the group complete; from now on it counts."""
        ...

    def is_finished(self) -> bool:
        """Return whether the group is complete, belongs to the job and is undamaged."""
        ...

    def names(self) -> list[str]:
        """Return the names of the tensors, in the order in which they came."""
        ...

    def note(self) -> Any:
        """Return what :meth:`finish` was given."""
        ...

    def get(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            CalibrationError: absent or damaged.
        """
        ...

    def drop(self) -> None:
        """Forget everything; nothing there is no error."""
        ...


class MemoryGroup:
    """A group in memory; tensors stay on their device."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.tensors: dict[str, Tensor] = {}
        self.kept_note: Any = None
        self.is_complete = False

    def put(self, name: str, tensor: Tensor) -> None:
        kept = tensor.detach()
        if kept.untyped_storage().nbytes() > kept.numel() * kept.element_size():
            kept = kept.clone()  # a view would keep all that it is cut from
        self.tensors[name] = kept
        self.is_complete = False

    def finish(self, note: Any = None) -> None:
        self.kept_note, self.is_complete = note, True

    def is_finished(self) -> bool:
        return self.is_complete

    def names(self) -> list[str]:
        return list(self.tensors)

    def note(self) -> Any:
        return self.kept_note

    def get(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CalibrationError(f"{self.label} holds no {name}")
        return self.tensors[name]

    def drop(self) -> None:
        self.tensors, self.kept_note, self.is_complete = {}, None, False


class FolderGroup:
    """A group in a folder; tensors come back on the CPU."""

    def __init__(self, path: Path, job_hash: str) -> None:
        self.path = path
        self.job_hash = job_hash
        self.entries: dict[str, dict[str, Any]] = {}
        self.kept_note: Any = None
        manifest = self._read_manifest()
        self.is_complete = manifest is not None
        self.is_verified = False
        if manifest is not None:
            self.entries, self.kept_note = manifest["tensors"], manifest["note"]

    def put(self, name: str, tensor: Tensor) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / MANIFEST).unlink(missing_ok=True)  # first of all: what follows makes it untrue
            self.is_complete = self.is_verified = False
            content = raw_bytes(tensor)
            partial = self.path / f".{name}.partial"
            with partial.open("wb") as handle:
                handle.write(content.data)
            partial.replace(self.path / f"{name}.bin")
        except OSError as error:
            raise self._cannot_write(error) from error
        self.entries[name] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "digest": digest(content)}

    def finish(self, note: Any = None) -> None:
        manifest = {"version": _VERSION, "job": self.job_hash, "note": note, "tensors": self.entries}
        partial = self.path / f".{MANIFEST}.partial"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as handle:
                json.dump({"digest": _digest_of(manifest), "manifest": manifest}, handle)
                handle.flush()
                os.fsync(handle.fileno())
            partial.replace(self.path / MANIFEST)
        except OSError as error:
            raise self._cannot_write(error) from error
        self.kept_note, self.is_complete, self.is_verified = note, True, True

    def is_finished(self) -> bool:
        if self.is_complete and not self.is_verified:
            try:
                for name in self.entries:
                    self.get(name)
            except CalibrationError:
                self.is_complete = False
            self.is_verified = True
        return self.is_complete

    def names(self) -> list[str]:
        return list(self.entries)

    def note(self) -> Any:
        return self.kept_note

    def get(self, name: str) -> Tensor:
        if name not in self.entries:
            raise CalibrationError(f"{self.path} holds no {name} of this job")
        entry = self.entries[name]
        file = self.path / f"{name}.bin"
        try:
            content = np.fromfile(file, dtype=np.uint8)
        except OSError as error:
            raise CalibrationError(f"{file} cannot be read ({error.strerror}); start the job again") from error
        if digest(content) != entry["digest"]:
            raise CalibrationError(f"{file} is damaged: its digest is not the manifest's; start the job again")
        dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
        # An empty array has no stride that view() takes.
        return torch.from_numpy(content).view(dtype).reshape(shape) if content.size else torch.empty(shape, dtype=dtype)

    def drop(self) -> None:
        try:
            (self.path / MANIFEST).unlink(missing_ok=True)  # an interrupted removal must not look complete
            shutil.rmtree(self.path, ignore_errors=True)
        except OSError as error:
            raise self._cannot_write(error) from error
        self.entries, self.kept_note, self.is_complete, self.is_verified = {}, None, False, False

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            manifest = found["manifest"]
            is_ours = found["digest"] == _digest_of(manifest) and manifest["job"] == self.job_hash
            return manifest if is_ours and manifest["version"] == _VERSION else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None  # absent, half written or something else: then it proves nothing

    def _cannot_write(self, error: OSError) -> CalibrationError:
        return CalibrationError(
            f"cannot write to {self.path} ({error.strerror}); free some space or choose another folder. What was"
            " finished before is kept, and the same command goes on from there"
        )


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """Return a tensor's bytes in row-major order, uint8."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, dtype=np.uint8)


def digest(content: np.ndarray) -> str:
    """Return the digest of bytes."""
    return hashlib.blake2b(content.data, digest_size=16).hexdigest()


def _digest_of(manifest: Any) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()
