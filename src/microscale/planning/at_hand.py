"""Parts of a model at hand in float32, one decoder layer at a time; afterwards the model is what it was, to the bit.

With a source the layers' weights lie in their files (``meta`` in the model): each is read when it is wanted and
forgotten afterwards, so that the model as a whole never stands in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from microscale.recipes import LayerSource, unstack_experts
from microscale.recipes.blocks import to_float32


class LayersAtHand:
    """Gives the decoder layers of a model, in float32, for the time of a ``with`` block."""

    def __init__(self, model: Any, source: LayerSource | None) -> None:
        self.model = model
        self._source = source

    @contextlib.contextmanager
    def stored(self, name: str) -> Generator[nn.Module, None, None]:
        """Yield a decoder layer with its weights in their own dtype.

        Raises:
            CheckpointError: it cannot be read.
        """
        module: nn.Module = self.model.get_submodule(name)
        if self._source is None or name not in self._source.names:
            yield module
            return
        read = self._source.read(name)
        unstack_experts(read)
        module.load_state_dict(read.state_dict(), assign=True)
        dtypes = [parameter.dtype for parameter in module.parameters()]
        del read
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
            if self._source is not None and name in self._source.names:
                to_float32(module)  # nothing need be kept: the file has it
                yield module
                return
            with float32_parameters(list(module.parameters())):
                yield module


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
