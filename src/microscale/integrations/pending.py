"""What stands in a state dict for a tensor that is still in its file, and is read now (PendingTensor) or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class PendingTensor:
    """A tensor that is read when transformers takes it, by ``pending[...]`` as it takes slices of safetensors files.

    ``dtype`` is the one in the file. ``wanted`` is that of its place in the model, once known (our quantizer is asked
    for it before the tensor is taken): it is then cast while it is read, so that both never stand in memory.
    """

    dtype: torch.dtype
    load: Callable[[torch.dtype | None], Tensor]
    wanted: torch.dtype | None = None

    def __getitem__(self, everything: EllipsisType) -> Tensor:
        return self.load(None if self.wanted == self.dtype else self.wanted)[everything]

    def is_floating_point(self) -> bool:
        """Whether it may be cast to the float type of the model."""
        return self.dtype.is_floating_point


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsentTensor:
    """A tensor that is not read: transformers, which takes it and moves it to its device, gets one on ``meta``."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __getitem__(self, everything: EllipsisType) -> AbsentTensor:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return an empty tensor on ``meta``, whatever the device."""
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")

    def is_floating_point(self) -> bool:
        """Whether it may be cast to the float type of the model."""
        return self.dtype.is_floating_point
