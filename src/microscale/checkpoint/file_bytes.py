"""Read a tensor's bytes from a file into the memory where they stay: no mapping, no second copy.

A mapped file counts as resident memory of the process page by page, beside the copy that a loader makes of it.
"""

from __future__ import annotations

import math
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from microscale.errors import CheckpointError

PIECE_BYTES = 1 << 15
"""What is cast or rearranged on the way passes through a buffer of this size: it stays in the nearest cache, and torch
works on it in the calling thread, without waiting for others on a busy machine."""


def read_into(file: FileIO, target: Tensor) -> None:
    """Fill a contiguous tensor with the next bytes of a file.

    Raises:
        CheckpointError: the file ends before.
        OSError: it cannot be read.
    """
    if not target.numel():
        return
    view = memoryview(cast(Any, target.view(-1).view(torch.uint8).numpy()))
    done = 0
    while done < len(view):  # one system call reads at most 2 GiB
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"the file ends after {done} of {len(view)} bytes; it is truncated: copy it again")
        done += count


def read_tensor(
    path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...], *, as_dtype: torch.dtype | None = None
) -> Tensor:
    """Read the little-endian tensor at ``offset``; with ``as_dtype`` it is cast piece by piece on the way.

    Raises:
        CheckpointError: the file ends before.
        OSError: it cannot be read.
    """
    target = torch.empty(shape, dtype=as_dtype or dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        if target.dtype == dtype:
            read_into(file, target)
            return target
        flat = target.view(-1)
        step = PIECE_BYTES // dtype.itemsize
        buffer = torch.empty(min(step, math.prod(shape)), dtype=dtype)
        for start in range(0, flat.numel(), step):
            piece = buffer[: min(step, flat.numel() - start)]
            read_into(file, piece)
            flat[start : start + step] = piece
    return target
