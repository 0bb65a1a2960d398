"""The inputs of the decoder layers on their way through the model: in memory or on disk, and where to go on.

In memory they lie where the model does, and come to the device of the layers batch by batch.

There are two flows. *Quantized*: each layer gets what the quantized ones before it give. *Exact*: what the unquantized
model gives, which is the target of methods that learn. Where layers are fed unquantized inputs, the exact flow is the
only one. A store holds the exact flow of a layer behind the quantized one, as batches of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.calibration.cache import ActivationStore
from microscale.layerwise.blocks import BlockRunner


class Flow(Enum):
    """Which flows a job needs; TARGETS: both, for layers are fed the quantized one and learn from the exact one."""

    QUANTIZED = "quantized"
    EXACT = "exact"
    TARGETS = "targets"


class StoredBatches(Sequence[Float[Tensor, "batch tokens width"]]):
    """The batches of one flow of a layer; each is read when it is asked for, onto ``device``."""

    def __init__(self, store: ActivationStore, layer_idx: int, first: int, num: int, device: torch.device) -> None:
        self._store = store
        self._layer_idx = layer_idx
        self._range = range(first, first + num)
        self._device = device

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self._read(place) for place in self._range[index]]
        return self._read(self._range[index])

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._read, self._range)

    def _read(self, place: int) -> Tensor:
        tensor = self._store.get(self._layer_idx, place)
        if self._store.path is None:
            return tensor.to(self._device)
        # Into torch's own memory, for the sums of a matrix product may depend on where its numbers begin.
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device).copy_(tensor)


class LayerStream:
    """The flows of a job: :meth:`start` once, then for each layer :meth:`targets`, the work, :meth:`advance`."""

    def __init__(self, runner: BlockRunner, store: ActivationStore, flow: Flow, num_layers: int) -> None:
        self.runner = runner
        self._store = store
        self._flow = flow
        self._num_layers = num_layers
        self._exact_first = runner.num_batches if flow is Flow.TARGETS else 0

    def start(self) -> None:
        """Store the inputs of the first layer."""
        for batch, hidden in enumerate(self.runner.embedded()):
            self._store.put(0, batch, hidden)
            if self._exact_first:
                self._store.put(0, self._exact_first + batch, hidden)
        self._store.finish_layer(0)

    def inputs(self, layer_idx: int) -> StoredBatches:
        """Return what a layer is fed."""
        return self._batches(layer_idx, 0)

    def targets(self, layer_idx: int) -> Sequence[Tensor]:
        """Run a layer that is not quantized yet on the exact flow, where there is one; returns its outputs."""
        if self._flow is Flow.QUANTIZED:
            return ()
        for batch, hidden in enumerate(self._batches(layer_idx, self._exact_first)):
            self._store.put(layer_idx + 1, self._exact_first + batch, self._run(layer_idx, batch, hidden))
        return self._batches(layer_idx + 1, self._exact_first)

    def advance(self, layer_idx: int) -> None:
        """Make the inputs of the next layer, by the quantized one where those are fed; the last makes none."""
        following = layer_idx + 1
        if following == self._num_layers:
            self._store.drop(following)
        elif self._flow is not Flow.EXACT:
            for batch, hidden in enumerate(self.inputs(layer_idx)):
                self._store.put(following, batch, self._run(layer_idx, batch, hidden))

    def finish(self, layer_idx: int) -> None:
        """Declare a layer done: a job that is started again goes on behind it."""
        self._store.finish_layer(layer_idx + 1)
        self._store.drop(layer_idx)

    def _batches(self, layer_idx: int, first: int) -> StoredBatches:
        return StoredBatches(self._store, layer_idx, first, self.runner.num_batches, self.runner.device)

    @torch.no_grad()
    def _run(self, layer_idx: int, batch: int, hidden: Tensor) -> Tensor:
        outputs = self.runner.run(layer_idx, hidden, batch=batch)
        return outputs.to(self.runner.home).contiguous()  # as it comes back from disk
