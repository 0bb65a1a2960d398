"""The inputs of decoder layers between two steps of a layer-by-layer job: in memory or on disk, and resumable.

A job goes through the layers in order. Of each layer it stores the inputs, batch by batch, and finishes the layer;
then it works on it, stores what became of it (its ``state``), stores and finishes the inputs of the next and drops
its own. After an interruption :meth:`ActivationStore.last_complete_layer` says where to go on. On disk everything lies
in a folder of its own named by the job's hash, so jobs can share a directory, and nothing but finished, undamaged
groups of this very job is ever used.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from microscale.calibration.tensor_group import FolderGroup, MemoryGroup, TensorGroup, digest, raw_bytes
from microscale.errors import CalibrationError
from microscale.formats.dtypes import dtype_name

_LAYER = re.compile(r"(inputs|state)-(\d{4,})$")


class ActivationStore:
    """Inputs, arguments and states of the decoder layers of one job.

    ``directory`` None keeps all in memory. ``job`` says all that the numbers depend on (model, text, format, method,
    seed …): another text is another job. In memory a tensor is kept, not copied, and must not be changed afterwards.

    Raises:
        CalibrationError: a directory that cannot be used.
    """

    def __init__(self, directory: str | Path | None, job: str) -> None:
        self.job_hash = hashlib.sha256(job.encode()).hexdigest()
        self.path = None if directory is None else Path(directory) / self.job_hash[:16]
        self.groups: dict[str, TensorGroup] = {}
        self.structures: dict[str, Any] = {}
        if self.path is not None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CalibrationError(f"{directory} cannot hold activations: {error.strerror}") from error
        arguments = self._group("arguments")
        if arguments.is_finished():
            self.structures = dict(arguments.note())

    def put(self, layer_idx: int, batch_idx: int, tensor: Tensor) -> None:
        """Store the input of a layer for one batch."""
        self._inputs(layer_idx).put(str(batch_idx), tensor)

    def finish_layer(self, layer_idx: int) -> None:
        """Declare the inputs of a layer complete: from now on a job can be resumed here."""
        self._inputs(layer_idx).finish()

    def get(self, layer_idx: int, batch_idx: int) -> Tensor:
        """Return the input of a layer for one batch; from disk it comes on the CPU.

        Raises:
            CalibrationError: absent or damaged.
        """
        return self._inputs(layer_idx).get(str(batch_idx))

    def num_batches(self, layer_idx: int) -> int:
        """Return how many batches of a layer's inputs are there."""
        return len(self._inputs(layer_idx).names())

    def last_complete_layer(self) -> int | None:
        """Return the highest layer whose inputs are finished and undamaged; None: begin anew.

        It does not count if a state that was stored for a layer before it is damaged. Every file is read.
        """
        states = self._known_layers("state")
        for layer_idx in sorted(self._known_layers("inputs"), reverse=True):
            earlier = [self._state(before).is_finished() for before in states if before < layer_idx]
            if all(earlier) and self._inputs(layer_idx).is_finished():
                return layer_idx
        return None

    def drop(self, layer_idx: int) -> None:
        """Forget the inputs of a layer."""
        self._inputs(layer_idx).drop()

    def put_state(self, layer_idx: int, tensors: Mapping[str, Tensor]) -> None:
        """Store what became of a layer, complete at once; the tensors' names are free."""
        group = self._state(layer_idx)
        group.drop()
        for place, tensor in enumerate(tensors.values()):
            group.put(str(place), tensor)
        group.finish(list(tensors))

    def state(self, layer_idx: int) -> dict[str, Tensor]:
        """Return what :meth:`put_state` stored.

        Raises:
            CalibrationError: absent or damaged.
        """
        group = self._state(layer_idx)
        if not group.is_finished():
            raise CalibrationError(f"the result of layer {layer_idx} is not stored, or is damaged; start the job again")
        return {name: group.get(str(place)) for place, name in enumerate(group.note())}

    def put_arguments(self, layer_idx: int, batch_idx: int, arguments: Mapping[str, Any]) -> None:
        """Store the keyword arguments that a layer gets with a batch; equal tensors are stored once.

        Tensors, None, bool, int, float, str and dicts, lists and tuples of them are possible.

        Raises:
            CalibrationError: something else, with its name.
        """
        group = self._group("arguments")
        encoded = {name: _encode(value, group, name) for name, value in arguments.items()}
        self.structures[f"{layer_idx}/{batch_idx}"] = encoded

    def finish_arguments(self) -> None:
        """Declare the arguments complete."""
        self._group("arguments").finish(self.structures)

    def has_arguments(self) -> bool:
        """Return whether finished, undamaged arguments are there."""
        return self._group("arguments").is_finished()

    def arguments(self, layer_idx: int, batch_idx: int) -> dict[str, Any]:
        """Return the keyword arguments of a layer for one batch.

        Raises:
            CalibrationError: absent or damaged.
        """
        found = self.structures.get(f"{layer_idx}/{batch_idx}")
        if found is None:
            raise CalibrationError(f"no arguments of layer {layer_idx} for batch {batch_idx} are stored")
        group = self._group("arguments")
        return {name: _decode(value, group) for name, value in found.items()}

    def clear(self) -> None:
        """Forget the whole job; the directory itself and other jobs in it stay."""
        self.groups.clear()
        self.structures.clear()
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)

    def _known_layers(self, kind: str) -> set[int]:
        names = set(self.groups)
        if self.path is not None and self.path.is_dir():
            names |= {entry.name for entry in self.path.iterdir()}
        return {int(match[2]) for match in map(_LAYER.match, names) if match and match[1] == kind}

    def _inputs(self, layer_idx: int) -> TensorGroup:
        return self._group(f"inputs-{layer_idx:04d}")

    def _state(self, layer_idx: int) -> TensorGroup:
        return self._group(f"state-{layer_idx:04d}")

    def _group(self, name: str) -> TensorGroup:
        if name not in self.groups:
            path = self.path
            self.groups[name] = MemoryGroup(name) if path is None else FolderGroup(path / name, self.job_hash)
        return self.groups[name]


def _encode(value: Any, group: TensorGroup, name: str) -> Any:
    """Return a value as JSON can say it, its tensors replaced by their digests; tuples stay tuples."""
    if isinstance(value, Tensor):
        key = digest(raw_bytes(value)) + f"-{dtype_name(value.dtype)}-{'x'.join(map(str, value.shape))}"
        if key not in group.names():
            group.put(key, value)
        return {"tensor": key}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    if isinstance(value, list | tuple):
        items = cast("list[Any] | tuple[Any, ...]", value)
        kind = "list" if isinstance(items, list) else "tuple"
        return {kind: [_encode(item, group, name) for item in items]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in cast("dict[Any, Any]", value)):
        return {"dict": {key: _encode(item, group, name) for key, item in cast("dict[str, Any]", value).items()}}
    raise CalibrationError(
        f"a decoder layer gets the argument {name!r} of type {type(value).__name__}, which cannot be stored; run the"
        " model without a cache (use_cache=False)"
    )


def _decode(encoded: Any, group: TensorGroup) -> Any:
    [(kind, content)] = encoded.items()
    match kind:
        case "tensor":
            return group.get(content)
        case "list":
            return [_decode(item, group) for item in content]
        case "dict":
            return {key: _decode(item, group) for key, item in content.items()}
        case "plain":
            return content
        case _:
            return tuple(_decode(item, group) for item in content)
