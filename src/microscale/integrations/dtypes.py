"""Float types that a caller names."""

from __future__ import annotations

import torch

from microscale.errors import DtypeError


def checked_dtype(dtype: object) -> torch.dtype | None:
    """Return a float type that was given as such or by its word; None stays None.

    Raises:
        DtypeError: something else.
    """
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise DtypeError(f"dtype is a float type of torch, such as torch.bfloat16 or 'bfloat16', got {dtype!r}")
    return found
