"""Checks of arguments that every backend makes before it computes, with the same words."""

from __future__ import annotations

import torch
from torch import Tensor

from microscale.errors import DtypeError, FormatError, NonFiniteError, ShapeError
from microscale.formats import Format, PairFormat, RuleKind, format_name
from microscale.layouts import matrix_shape
from microscale.layouts.row_major import grid_shape

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_values(values: Tensor, name: str) -> tuple[int, int]:
    """Return (rows, cols) of a tensor that can be quantized.

    Raises:
        DtypeError: not one of the three float types.
        ShapeError: a scalar or an empty tensor.
    """
    if values.dtype not in FLOAT_DTYPES:
        raise DtypeError(
            f"{name} must be float32, bfloat16 or float16 to be quantized, got {values.dtype}; cast it first"
        )
    rows, cols = matrix_shape(tuple(values.shape))
    if rows * cols == 0:
        raise ShapeError(f"{name} has shape {list(values.shape)}: an empty tensor cannot be quantized")
    return rows, cols


def uses_amax(fmt: Format) -> bool:
    """Whether a given amax changes anything: a rule that looks at amax, or a second level that follows from it."""
    if isinstance(fmt, PairFormat) or fmt.zero_point is not None:
        return False
    return fmt.tensor_scale is not None or fmt.rule.kind not in (RuleKind.STD, RuleKind.PERCENTILE)


def check_amax(amax: Tensor | None, fmt: Format, rows: int, cols: int, name: str) -> None:
    """Check a given amax against the grid of blocks.

    Raises:
        FormatError: a format that cannot use one.
        ShapeError: one that does not fit the grid.
        NonFiniteError: one that is not finite or negative.
    """
    if amax is None:
        return
    if isinstance(fmt, PairFormat) or not uses_amax(fmt):
        raise FormatError(
            f"{format_name(fmt)} takes the scales of {name} from all numbers of each block; it cannot use a given amax,"
            " leave it out"
        )
    grid = grid_shape(fmt.block, rows, cols)
    if fmt.tensor_scale is None and not _fits(amax.shape, grid):
        raise ShapeError(f"the amax of {name} must fit its grid of blocks {list(grid)}, got {list(amax.shape)}")
    if not bool((torch.isfinite(amax) & (amax >= 0)).all()):
        raise NonFiniteError(f"the amax given for {name} must be finite and not negative; calibrate again")


def _fits(shape: tuple[int, ...], grid: tuple[int, int]) -> bool:
    padded = (1,) * (2 - len(shape)) + tuple(shape)
    return len(padded) == 2 and all(size in (1, wanted) for size, wanted in zip(padded, grid, strict=True))
