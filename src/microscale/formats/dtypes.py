"""Words and torch's dtypes: which floats are computed in, and the word of a dtype in files, tables and options."""

from __future__ import annotations

import torch

from microscale.errors import DtypeError, nearest

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The floats that are quantized, and that layers compute in."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the word of a dtype, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def named_dtype(word: str) -> torch.dtype | None:
    """Return the dtype of a word (``bfloat16`` or ``torch.bfloat16``), None where torch has none of that name."""
    found = getattr(torch, word.removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else None


def parse_dtype(word: str) -> torch.dtype:
    """Return one of :data:`FLOAT_DTYPES` by its word.

    Raises:
        DtypeError: another word.
    """
    known = {dtype_name(dtype): dtype for dtype in FLOAT_DTYPES}
    if word not in known:
        raise DtypeError(f"unknown dtype {word!r}{nearest(word, known) or ';'} possible: {', '.join(known)}")
    return known[word]


def checked_dtype(dtype: object) -> torch.dtype | None:
    """Return a float type that was given as such or by its word; None stays None.

    Raises:
        DtypeError: something else.
    """
    if dtype is None:
        return None
    found = named_dtype(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise DtypeError(f"dtype is a float type of torch, such as torch.bfloat16 or 'bfloat16', got {dtype!r}")
    return found
