"""rms_norm, silu_mul, hadamard and the four fused quantizations by the compiled kernels.

Each makes a row in float32, rounds it once to the dtype of the input and stores or encodes it, so that the fused
result is quantize(operation(x)) of this backend bit for bit. Formats with a scale for the whole tensor, sparse tables
and pairs need all rows before the first code: they go through memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from microscale.errors import KernelError, ShapeError
from microscale.formats import BlockFormat, Format, SegmentedFormat
from microscale.kernels.checks import check_gather, check_hadamard, check_rms_norm, check_silu_mul, outside_message
from microscale.kernels.cpu import native
from microscale.kernels.cpu.descriptors import descriptor
from microscale.kernels.cpu.enums import DTYPES, FusedOperation
from microscale.kernels.cpu.memory import new_tensor
from microscale.kernels.cpu.quantize import address, block_addresses, check_counts, check_device, quantize
from microscale.layouts import matrix_shape, part_specs
from microscale.tensor import QuantizedTensor, join_segments


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """The arguments of one operation, checked and contiguous; ``shape`` is that of the result."""

    operation: FusedOperation
    values: Tensor
    shape: tuple[int, ...]
    other: Tensor | None = None
    columns: Tensor | None = None
    signs: Tensor | None = None
    size: int = 0
    eps: float = 0.0

    def run(self, result: Tensor | None, fmt: BlockFormat | None, parts: Mapping[str, Tensor]) -> tuple[int, int, int]:
        """Fill ``result``, or the parts of a quantized tensor; return the counts of quantize."""
        if native.NATIVE is None:
            raise KernelError(native.UNAVAILABLE or "the compiled CPU kernels are not installed")
        rows, cols = matrix_shape(self.shape)
        outside, *counts = native.NATIVE.fused(
            level=native.level(),
            operation=self.operation,
            dtype=DTYPES[self.values.dtype],
            values=self.values.data_ptr(),
            rows=rows,
            cols=cols,
            source_cols=self.values.shape[-1],
            other=address(self.other),
            other_dtype=DTYPES[self.other.dtype if self.other is not None else self.values.dtype],
            columns=address(self.columns),
            signs=address(self.signs),
            size=self.size,
            eps=self.eps,
            result=address(result),
            format=0 if fmt is None else ctypes.addressof(descriptor(fmt)),
            threads=native.num_threads(),
            **block_addresses(parts),
        )
        if outside:
            assert self.columns is not None
            raise ShapeError(outside_message(self.columns, self.values.shape[-1]))
        return counts[0], counts[1], counts[2]


def rms_norm(values: Float[Tensor, "... cols"], weight: Float[Tensor, "cols"], eps: float) -> Float[Tensor, "... cols"]:
    """See :func:`microscale.kernels.ops.rms_norm`."""
    return _transform(_rms_norm_call(values, weight, eps))


def silu_mul(gate: Float[Tensor, "..."], up: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """See :func:`microscale.kernels.ops.silu_mul`."""
    return _transform(_silu_mul_call(gate, up))


def hadamard(
    values: Float[Tensor, "... cols"], size: int, signs: Float[Tensor, "cols"] | None = None
) -> Float[Tensor, "... cols"]:
    """See :func:`microscale.kernels.ops.hadamard`."""
    return _transform(_hadamard_call(values, size, signs))


def rms_norm_quantize(
    values: Float[Tensor, "... cols"], weight: Float[Tensor, "cols"], eps: float, fmt: Format
) -> QuantizedTensor:
    """See :func:`microscale.kernels.ops.rms_norm_quantize`."""
    return _quantize(_rms_norm_call(values, weight, eps), fmt)


def silu_mul_quantize(gate: Float[Tensor, "..."], up: Float[Tensor, "..."], fmt: Format) -> QuantizedTensor:
    """See :func:`microscale.kernels.ops.silu_mul_quantize`."""
    return _quantize(_silu_mul_call(gate, up), fmt)


def gather_quantize(values: Float[Tensor, "... cols"], columns: Int[Tensor, "n"], fmt: Format) -> QuantizedTensor:
    """See :func:`microscale.kernels.ops.gather_quantize`."""
    check_gather(values, columns)
    if isinstance(fmt, SegmentedFormat) and columns.numel() == fmt.cols:
        return join_segments([gather_quantize(values, columns[at], part) for part, at in fmt.places()], fmt)
    call = _Call(
        operation=FusedOperation.GATHER,
        values=_ready(values, "the input"),
        shape=(*values.shape[:-1], columns.numel()),
        columns=_ready(columns, "the columns"),
    )
    return _quantize(call, fmt)


def hadamard_quantize(
    values: Float[Tensor, "... cols"], size: int, fmt: Format, signs: Float[Tensor, "cols"] | None = None
) -> QuantizedTensor:
    """See :func:`microscale.kernels.ops.hadamard_quantize`."""
    return _quantize(_hadamard_call(values, size, signs), fmt)


def _ready(tensor: Tensor, name: str) -> Tensor:
    check_device(tensor, name)
    return tensor.detach().resolve_neg().contiguous()


def _rms_norm_call(values: Tensor, weight: Tensor, eps: float) -> _Call:
    check_rms_norm(values, weight, eps)
    return _Call(
        operation=FusedOperation.RMS_NORM,
        values=_ready(values, "the input"),
        shape=tuple(values.shape),
        other=_ready(weight, "the weight"),
        eps=eps,
    )


def _silu_mul_call(gate: Tensor, up: Tensor) -> _Call:
    check_silu_mul(gate, up)
    return _Call(
        operation=FusedOperation.SILU_MUL,
        values=_ready(gate, "the gate"),
        shape=tuple(gate.shape),
        other=_ready(up, "the up"),
    )


def _hadamard_call(values: Tensor, size: int, signs: Tensor | None) -> _Call:
    check_hadamard(values, size, signs)
    return _Call(
        operation=FusedOperation.HADAMARD,
        values=_ready(values, "the input"),
        shape=tuple(values.shape),
        signs=None if signs is None else _ready(signs, "the signs"),
        size=size,
    )


def _transform(call: _Call) -> Float[Tensor, "..."]:
    result = new_tensor(call.shape, call.values.dtype)
    if result.numel():
        call.run(result, None, {})
    return result


def _quantize(call: _Call, fmt: Format) -> QuantizedTensor:
    if not isinstance(fmt, BlockFormat) or fmt.sparse is not None or fmt.tensor_scale is not None:
        return quantize(_transform(call), fmt)
    rows, cols = matrix_shape(call.shape)
    if rows * cols == 0:
        raise ShapeError(f"the result has shape {list(call.shape)}: an empty tensor cannot be quantized")
    parts = {name: new_tensor(spec.shape, spec.dtype) for name, spec in part_specs(fmt, (rows, cols)).items()}
    num_nan, num_inf, num_undecided = call.run(None, fmt, parts)
    check_counts(fmt, "the result", rows * cols, num_nan, num_inf)
    if num_undecided:
        return quantize(_transform(call), fmt)
    return QuantizedTensor(format=fmt, shape=call.shape, dtype=call.values.dtype, parts=parts)
