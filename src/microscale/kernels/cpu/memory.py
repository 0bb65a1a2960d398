"""New tensors for the results of kernels, with their memory mapped in one go where they are large."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from microscale.kernels.cpu import native

LARGE_BYTES = 4 << 20
"""From this size on mapping new memory page by page costs more than one call that maps all of it."""


def new_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized contiguous tensor that a kernel is going to fill."""
    result = torch.empty(tuple(shape), dtype=dtype)
    if native.NATIVE is not None and result.nbytes >= LARGE_BYTES:
        native.NATIVE.prepare_memory(result.data_ptr(), result.nbytes)
    return result
