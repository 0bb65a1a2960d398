"""PackedModule: the common part of all modules that hold one quantized weight."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microscale.formats import Format, format_name
from microscale.kernels import dequantize
from microscale.layouts import part_specs
from microscale.tensor import QuantizedTensor

PREFIX = "weight_"
"""The parts of the weight are the buffers ``weight_<part>``, and so the names in the state dict and in our files."""


class PackedModule(nn.Module):
    """A module with one packed weight; its bytes are those of the checkpoint.

    Casting the module (``to(dtype)``, ``half()``) never touches the packed parts: their dtypes belong to the
    format. ``method`` records how the codes were found, ``kind`` what the module stands for in the model:
    ``linear``, ``conv1d`` (a linear layer whose float weight the model keeps as [in, out]) or ``embedding``.
    """

    def __init__(
        self,
        fmt: Format,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        device: torch.device | str | None,
        method: str,
        kind: str,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.format = fmt
        self.shape = shape
        self.weight_dtype = dtype
        self.method = method
        self._part_names = tuple(part_specs(fmt, shape))
        self._cached_weight: Tensor | None = None
        for name, spec in part_specs(fmt, shape).items():
            self.register_buffer(PREFIX + name, torch.empty(spec.shape, dtype=spec.dtype, device=device))

    def set_tensor(self, tensor: QuantizedTensor) -> None:
        """Take over the parts of a quantized tensor of the module's format and shape."""
        assert tensor.format == self.format and tensor.shape == self.shape
        for name, part in tensor.parts.items():
            setattr(self, PREFIX + name, part)
        self._cached_weight = None

    @property
    def tensor(self) -> QuantizedTensor:
        """The packed weight; it shares memory with the module's buffers."""
        parts = {name: self.get_buffer(PREFIX + name) for name in self._part_names}
        return QuantizedTensor(format=self.format, shape=self.shape, dtype=self.weight_dtype, parts=parts)

    @property
    def weight(self) -> Float[Tensor, "..."]:
        """The dequantized weight, made anew at every access."""
        return dequantize(self.tensor)

    def float_weight(self, dtype: torch.dtype) -> Float[Tensor, "..."] | None:
        """Return the weight that :func:`cached_weights` keeps in a float dtype, or None outside of it."""
        if self._cached_weight is not None and self._cached_weight.dtype != dtype:
            self._cached_weight = dequantize(self.tensor, dtype)
        return self._cached_weight

    def cache_weight(self) -> None:
        """Dequantize once and keep the result, until :meth:`drop_cached_weight`."""
        self._cached_weight = dequantize(self.tensor, self.weight_dtype)

    def drop_cached_weight(self) -> None:
        """Forget the float weight."""
        self._cached_weight = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        kept = {PREFIX + name: self._buffers[PREFIX + name] for name in self._part_names}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        self._cached_weight = None
        return self

    def extra_repr(self) -> str:
        return f"{'x'.join(str(length) for length in self.shape)}, {format_name(self.format)}"


@contextmanager
def cached_weights(model: nn.Module) -> Generator[None, None, None]:
    """Keep a float copy of every packed weight inside the block: faster on the reference path, for more memory."""
    modules = [module for module in model.modules() if isinstance(module, PackedModule)]
    for module in modules:
        module.cache_weight()
    try:
        yield
    finally:
        for module in modules:
            module.drop_cached_weight()
