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
from typing import Any

from torch import Tensor

from microscale.calibration.tensor_group import FolderGroup, MemoryGroup, TensorGroup
from microscale.errors import CalibrationError

_LAYER = re.compile(r"(inputs|state)-(\d{4,})$")


class ActivationStore:
    """Inputs and states of the decoder layers of one job, and facts about all of them.

    ``directory`` None keeps all in memory. ``job`` says all that the numbers depend on (model, text, format, method,
    seed …): another text is another job. In memory a tensor is kept, not copied, and must not be changed afterwards.

    Raises:
        CalibrationError: a directory that cannot be used.
    """

    def __init__(self, directory: str | Path | None, job: str) -> None:
        self.job_hash = hashlib.sha256(job.encode()).hexdigest()
        self.path = None if directory is None else Path(directory) / self.job_hash[:16]
        self.groups: dict[str, TensorGroup] = {}
        if self.path is not None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CalibrationError(f"{directory} cannot hold activations: {error.strerror}") from error

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

    def put_facts(self, facts: Mapping[str, Any]) -> None:
        """Store what is known of all layers, as JSON can say it; complete at once."""
        self._group("facts").finish(dict(facts))

    def facts(self) -> Mapping[str, Any]:
        """Return what :meth:`put_facts` stored.

        Raises:
            CalibrationError: absent or damaged.
        """
        group = self._group("facts")
        if not group.is_finished():
            raise CalibrationError("what is known of all layers is not stored, or is damaged; start the job again")
        return group.note()

    def clear(self) -> None:
        """Forget the whole job; the directory itself and other jobs in it stay."""
        self.groups.clear()
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
