"""The decoder layers of a model at hand, one at a time, also where their weights still lie in a file.

A model that was built without its decoder layers has them on ``meta``; a source reads each from its file. A layer comes
to stay (:meth:`LayerLoader.load`), or for the time of a block (:meth:`LayerLoader.stored`, :meth:`LayerLoader.layer`),
after which the model is what it was, to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from microscale.layerwise.blocks import to_float32
from microscale.nn.experts import unstack_experts


class LayerSource(Protocol):
    """A checkpoint that gives the float weights of one decoder layer at a time."""

    @property
    def names(self) -> tuple[str, ...]:
        """The decoder layers whose weights a model of this source lacks (they lie on ``meta``)."""
        ...

    def read(self, name: str) -> nn.Module:
        """Return a decoder layer with its weights, built as transformers builds it."""
        ...


def _anything(name: str) -> None:
    del name


class LayerLoader:
    """Brings decoder layers into a model that was built without them; a model without a source has all of them."""

    def __init__(self, model: Any, source: LayerSource | None, check: Callable[[str], None] = _anything) -> None:
        """Take a model and its source; ``check`` is called with the name of every layer that came to stay."""
        self.model = model
        self._source = source
        self._check = check
        self._pending = set(source.names) if source is not None else set[str]()

    @property
    def is_partial(self) -> bool:
        """Whether the model was built without its decoder layers."""
        return self._source is not None

    def load(self, name: str) -> None:
        """Bring a layer to stay; one that is there already is left alone.

        Raises:
            CheckpointError: it cannot be read.
            NonFiniteError: a weight that is to be quantized holds NaN or Inf.
        """
        if name in self._pending:
            self._read(name)
            self._pending.discard(name)
            self._check(name)

    def load_rest(self) -> None:
        """Bring all layers that nothing has asked for."""
        for name in sorted(self._pending):
            self.load(name)

    def restored(self, name: str) -> None:
        """Note that a layer came from somewhere else."""
        self._pending.discard(name)

    @contextlib.contextmanager
    def stored(self, name: str) -> Generator[nn.Module, None, None]:
        """Yield a decoder layer with its weights in their own dtype; one that was read is forgotten afterwards.

        Raises:
            CheckpointError: it cannot be read.
        """
        if name not in self._pending:
            yield self.model.get_submodule(name)
            return
        module = self._read(name)
        dtypes = [parameter.dtype for parameter in module.parameters()]
        try:
            yield module
        finally:
            _forget(module, dtypes)

    @contextlib.contextmanager
    def layer(self, name: str) -> Generator[nn.Module, None, None]:
        """Yield a decoder layer in float32; gradients that arise in the block end with it.

        Raises:
            CheckpointError: it cannot be read.
        """
        with self.stored(name) as module:
            if name in self._pending:
                to_float32(module)  # nothing need be kept: the file has it
                yield module
                return
            with float32_parameters(list(module.parameters())):
                yield module

    def _read(self, name: str) -> nn.Module:
        assert self._source is not None
        layer = self._source.read(name)
        unstack_experts(layer)
        module: nn.Module = self.model.get_submodule(name)
        module.load_state_dict(layer.state_dict(), assign=True)
        return module


@contextlib.contextmanager
def float32_parameters(parameters: Sequence[nn.Parameter]) -> Generator[None, None, None]:
    """Hold parameters in float32 inside the block; they get their own numbers back, and no gradient stays."""
    before: list[tuple[nn.Parameter, Tensor, bool]] = [
        (parameter, parameter.data, parameter.requires_grad) for parameter in parameters
    ]
    for parameter, data, _ in before:
        parameter.requires_grad_(False)
        if parameter.is_floating_point():
            parameter.data = data.to(torch.float32)
    try:
        yield
    finally:
        for parameter, data, needs_grad in before:
            parameter.grad = None
            parameter.data = data
            parameter.requires_grad_(needs_grad)


def _forget(module: nn.Module, dtypes: Sequence[torch.dtype]) -> None:
    """Put all parameters on ``meta``, in these dtypes; buffers stay, for no file holds them."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, dtype=dtype, device="meta"), requires_grad=False)
        for parameter, dtype in zip(module.parameters(), dtypes, strict=True)
    }
    for part in module.modules():
        for key, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, key, empty[id(parameter)])
