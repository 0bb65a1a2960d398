"""Packing into the layout rows16 by the compiled kernels; bitwise what :mod:`microscale.kernels.cpu.rows16` packs."""

from __future__ import annotations

import torch
from torch import Tensor

from microscale.errors import KernelError
from microscale.formats import BlockFormat, FloatElement, VectorBlock
from microscale.kernels.cpu import native, rows16
from microscale.kernels.cpu.largest import INDEX_BITS, compact_largest, read_index
from microscale.layouts import matrix_shape, part_specs
from microscale.tensor import QuantizedTensor

NO_PLACE = 255
"""A block without a largest element apart."""
ZERO_BLOCK = 254
"""A block whose codes are cleared, because its scale says zero."""


def to_layout(tensor: QuantizedTensor, name: str) -> QuantizedTensor:
    """Return a row_major tensor in the layout ``name``, which can only be rows16."""
    assert name == rows16.NAME
    return pack_rows16(tensor)


def pack_rows16(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return a row_major tensor of the CPU in the layout rows16.

    Raises:
        LayoutError: the format has no such layout.
        KernelError: the kernels are not installed, or the tensor is elsewhere or in another layout.
    """
    if native.NATIVE is None:
        raise KernelError(str(native.UNAVAILABLE))
    if tensor.device.type != "cpu" or tensor.layout != "row_major":
        raise KernelError(
            f"pack_rows16 takes a row_major tensor of the CPU, got {tensor.layout} on {tensor.device}; move it first"
        )
    fmt = rows16.accepted(tensor.format, tensor.shape)
    rows, cols = matrix_shape(tensor.shape)
    parts = {name: part.contiguous() for name, part in tensor.parts.items()}
    packed: dict[str, Tensor] = {}
    for name, spec in rows16.part_specs(fmt, tensor.shape).items():
        is_shared = rows16.is_shared(name)
        packed[name] = parts[name] if is_shared else torch.empty(spec.shape, dtype=spec.dtype)
    largest = _Largest(parts, fmt) if fmt.is_extended else None
    if rows * cols:
        arguments = _arguments(parts["codes"], packed, fmt, rows, cols)
        arguments |= _largest_arguments(largest, fmt)
        native.NATIVE.pack_rows16(native.level(), arguments, native.num_threads())
    sides = rows16.side_grids(parts, fmt) | (largest.sides() if largest is not None else {})
    for name, grid in sides.items():
        packed[name].copy_(rows16.interleave(grid, fmt, cols))
    return QuantizedTensor(format=fmt, shape=tensor.shape, dtype=tensor.dtype, parts=packed, layout=rows16.NAME)


class _Largest:
    """The places of the largest elements, and the bytes that the kernel takes out of them."""

    def __init__(self, parts: dict[str, Tensor], fmt: BlockFormat) -> None:
        assert isinstance(fmt.block, VectorBlock)
        self.split = compact_largest(fmt)
        self.index, is_extended = read_index(parts, fmt)
        other = ZERO_BLOCK if fmt.has_zero_code else NO_PLACE
        self.place = torch.where(is_extended, self.index & (fmt.block.size - 1), other)
        self.side = torch.zeros_like(self.place)

    def sides(self) -> dict[str, Tensor]:
        """Return the grids of the index and, where there is one, of the largest codes."""
        if self.split is None:
            return {"index": self.index, "largest": self.side}
        return {"index": self.index | self.side << INDEX_BITS}


def _arguments(codes: Tensor, packed: dict[str, Tensor], fmt: BlockFormat, rows: int, cols: int) -> dict[str, int]:
    element = fmt.element
    row_bytes = part_specs(fmt, (rows, cols))["codes"].shape[1]
    subnormals = packed.get("subnormals")
    is_float = isinstance(element, FloatElement)
    magnitude_bits = element.exponent_bits + element.mantissa_bits if is_float else 0
    return {
        "bits": element.bits,
        "rows": rows,
        "cols": cols,
        "row_bytes": row_bytes,
        "codes": codes.data_ptr(),
        "packed": packed["codes"].data_ptr(),
        "subnormals": 0 if subnormals is None else subnormals.data_ptr(),
        "magnitude_mask": 2**magnitude_bits - 1,
        "num_mantissas": 2**element.mantissa_bits if is_float else 0,
        "max_code": element.max_code,
    }


def _largest_arguments(largest: _Largest | None, fmt: BlockFormat) -> dict[str, int]:
    split = None if largest is None else largest.split
    return {
        "place": 0 if largest is None else largest.place.data_ptr(),
        "side": 0 if largest is None else largest.side.data_ptr(),
        "grid_cols": 0 if largest is None else largest.place.shape[1],
        "block_size": fmt.block.size if isinstance(fmt.block, VectorBlock) else 0,
        "zero_block": ZERO_BLOCK,
        "is_compact": split is not None,
        "is_int": split is not None and split.is_int,
        "low_bits": 0 if split is None else split.low_bits,
        "magnitude_bits": 0 if split is None else split.magnitude_bits,
        "first_code": 0 if split is None else split.first_code,
    }
