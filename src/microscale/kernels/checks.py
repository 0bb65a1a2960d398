"""Checks of arguments that every backend makes before it computes, with the same words."""

from __future__ import annotations

import torch
from torch import Tensor

from microscale.errors import DtypeError, FormatError, NonFiniteError, ShapeError, check_kind
from microscale.formats import Draw, Format, PairFormat, RuleKind, SegmentedFormat, format_name
from microscale.formats.dtypes import FLOAT_DTYPES
from microscale.kernels.backend import Operation, Request
from microscale.layouts import matrix_shape
from microscale.layouts.row_major import grid_shape
from microscale.tensor import QuantizedTensor


def check_values(values: Tensor, name: str) -> tuple[int, int]:
    """Return (rows, cols) of a tensor that can be quantized.

    Raises:
        DtypeError: not one of the three float types.
        ShapeError: a scalar or an empty tensor.
    """
    check_kind(values, Tensor, name, "a torch tensor", error=DtypeError)
    if values.dtype not in FLOAT_DTYPES:
        raise DtypeError(
            f"{name} must be float32, bfloat16 or float16 to be quantized, got {values.dtype}; cast it first"
        )
    rows, cols = matrix_shape(tuple(values.shape))
    if rows * cols == 0:
        raise ShapeError(f"{name} has shape {list(values.shape)}: an empty tensor cannot be quantized")
    return rows, cols


def check_draw(draw: object) -> None:
    """Refuse what is neither a draw nor None.

    Raises:
        ArgumentError: with what it is.
    """
    expected = "a microscale.formats.Draw(seed=, step=, place=) or None"
    check_kind(draw, (Draw, type(None)), "the draw", expected)


def check_quantized(tensor: object, name: str) -> None:
    """Refuse what is no quantized tensor.

    Raises:
        ArgumentError: with what it is.
    """
    check_kind(tensor, QuantizedTensor, name, "a QuantizedTensor (quantize makes one)")


def check_float_dtype(dtype: object, name: str) -> None:
    """Refuse what is no float dtype of torch.

    Raises:
        ArgumentError: no dtype.
        DtypeError: another one.
    """
    check_kind(dtype, torch.dtype, name, "a float dtype of torch")
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise DtypeError(f"{name} must be a float dtype, got {dtype}")


def uses_amax(fmt: Format) -> bool:
    """Whether a given amax changes anything: a rule that looks at amax, or a second level that follows from it."""
    if isinstance(fmt, PairFormat | SegmentedFormat) or fmt.zero_point is not None:
        return False
    return fmt.tensor_scale is not None or fmt.rule.kind not in (RuleKind.STD, RuleKind.PERCENTILE)


def check_amax(amax: Tensor | None, fmt: Format, rows: int, cols: int, name: str) -> None:
    """Check a given amax against the grid of blocks, and the width against that of segments.

    Raises:
        FormatError: a format that cannot use one.
        ShapeError: one that does not fit the grid; segments of another width.
        NonFiniteError: one that is not finite or negative.
    """
    if isinstance(fmt, SegmentedFormat) and cols != fmt.cols:
        raise ShapeError(f"{format_name(fmt)} is for {fmt.cols} columns, but {name} has {cols}")
    if amax is None:
        return
    if isinstance(fmt, PairFormat | SegmentedFormat) or not uses_amax(fmt):
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


HADAMARD_SIZES = (16, 32, 64, 128)
"""Block lengths of the Walsh-Hadamard transform."""


def check_float(values: object, name: str) -> None:
    """Refuse what is not a float32, bfloat16 or float16 tensor with at least one axis.

    Raises:
        ArgumentError: no tensor.
        DtypeError: another dtype.
        ShapeError: a scalar.
    """
    check_kind(values, Tensor, name, "a torch tensor")
    assert isinstance(values, Tensor)
    if values.dtype not in FLOAT_DTYPES:
        raise DtypeError(f"{name} must be float32, bfloat16 or float16, got {values.dtype}; cast it first")
    if values.dim() == 0:
        raise ShapeError(f"{name} needs at least one axis, got a scalar; reshape it to [1]")


def check_rms_norm(values: Tensor, weight: Tensor, eps: float) -> None:
    """Check that a weight belongs to the last axis and eps is a number.

    Raises:
        DtypeError: not a float.
        ShapeError: another length.
    """
    check_float(values, "the input of rms_norm")
    check_float(weight, "the weight of rms_norm")
    if tuple(weight.shape) != (values.shape[-1],):
        raise ShapeError(f"the weight of rms_norm must be [{values.shape[-1]}], got {list(weight.shape)}")
    check_kind(eps, (float, int), "the eps of rms_norm", "a number")


def check_silu_mul(gate: Tensor, up: Tensor) -> None:
    """Check that gate and up belong together.

    Raises:
        DtypeError: not a float, or two dtypes.
        ShapeError: two shapes.
    """
    check_float(gate, "the gate of silu_mul")
    check_float(up, "the up of silu_mul")
    if up.dtype != gate.dtype:
        raise DtypeError(f"gate and up of silu_mul must have one dtype, got {gate.dtype} and {up.dtype}")
    if up.shape != gate.shape:
        raise ShapeError(f"gate and up of silu_mul must have one shape, got {list(gate.shape)} and {list(up.shape)}")


def check_gather(values: Tensor, columns: Tensor) -> None:
    """Check the columns of a gather; their range is checked by who reads them.

    Raises:
        DtypeError: values that are no floats, or columns that are not int64.
        ShapeError: columns with more or fewer than one axis.
    """
    check_float(values, "the input of gather_quantize")
    check_kind(columns, Tensor, "the columns of gather_quantize", "an int64 tensor")
    if columns.dtype != torch.int64:
        raise DtypeError(f"the columns of gather_quantize must be int64, got {columns.dtype}")
    if columns.dim() != 1:
        raise ShapeError(f"the columns of gather_quantize must have one axis, got {list(columns.shape)}")


def outside_message(columns: Tensor, cols: int) -> str:
    """Return what every backend says of columns that do not exist."""
    wrong = int(((columns < 0) | (columns >= cols)).sum())
    return f"the columns of gather_quantize must be from 0 to {cols - 1}, but {wrong} of {columns.numel()} are not"


def check_hadamard(values: Tensor, size: int, signs: Tensor | None) -> None:
    """Check that blocks of ``size`` fill the last axis.

    Raises:
        DtypeError: values that are no floats, or signs that are not float32.
        ShapeError: a size that is not possible, an axis that it does not divide, signs of another length.
    """
    check_float(values, "the input of hadamard")
    check_kind(size, int, "the size of hadamard", "a whole number")
    check_kind(signs, (Tensor, type(None)), "the signs of hadamard", "a float32 tensor or None")
    if size not in HADAMARD_SIZES:
        raise ShapeError(f"the size of hadamard is one of {', '.join(map(str, HADAMARD_SIZES))}, got {size}")
    if values.shape[-1] % size:
        raise ShapeError(f"hadamard needs a last axis that {size} divides, got {values.shape[-1]}")
    if signs is not None and signs.dtype != torch.float32:
        raise DtypeError(f"the signs of hadamard must be float32, got {signs.dtype}")
    if signs is not None and tuple(signs.shape) != (values.shape[-1],):
        raise ShapeError(f"the signs of hadamard must be [{values.shape[-1]}], got {list(signs.shape)}")


def records_gradient(inputs: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd must see a product with a packed weight."""
    return torch.is_grad_enabled() and (inputs.requires_grad or (bias is not None and bias.requires_grad))


def linear_request(
    operation: Operation, inputs: Tensor, weight: QuantizedTensor, bias: Tensor | None, activations: Format | None
) -> Request:
    """Return what a product of inputs with a packed weight asks of a backend."""
    return Request(
        operation=operation,
        format=weight.format,
        device=inputs.device,
        dtype=inputs.dtype,
        layout=weight.layout,
        activations=activations,
        records_gradient=records_gradient(inputs, bias),
    )
