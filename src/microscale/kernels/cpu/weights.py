"""What the linear kernels are told about a weight: its format, where its parts lie, and what its scale codes mean."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microscale.errors import KernelError
from microscale.formats import BlockFormat, SparseElement, format_name
from microscale.formats.codec import decode
from microscale.formats.elements import E4M3
from microscale.kernels.cpu.descriptors import descriptor
from microscale.kernels.cpu.native import NATIVE
from microscale.kernels.cpu.rows16 import NAME as ROWS16
from microscale.kernels.reference.scales import scale_factor
from microscale.tensor import QuantizedTensor

PARTS = ("codes", "scale", "index", "largest", "zero_point", "subnormals")
"""The parts that the kernels read as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A weight as the extension knows it, with the tensors whose memory it points into."""

    handle: Any
    rows: int
    cols: int
    num_bytes: int
    kept: tuple[Tensor, ...]


def pack_weight(tensor: QuantizedTensor) -> PackedWeight:
    """Describe a quantized weight [rows, cols] in the layout rows16 to the kernels; nothing is copied.

    Raises:
        KernelError: another layout, or a device other than the CPU.
    """
    if tensor.layout != ROWS16 or not isinstance(tensor.format, BlockFormat) or tensor.device.type != "cpu":
        raise KernelError(
            f"the CPU kernels read weights of the layout {ROWS16} on the CPU, got {format_name(tensor.format)} in"
            f" {tensor.layout} on {tensor.device}; lay the tensor out first"
        )
    assert NATIVE is not None
    fmt = tensor.format
    parts = {name: part.contiguous() for name, part in tensor.parts.items()}
    read = {name: part for name, part in parts.items() if name in PARTS} | _sparse_parts(fmt, parts)
    tensor_inv = parts.get("tensor_inv_scale")
    handle = NATIVE.make_weight(
        format=ctypes.addressof(descriptor(fmt)),
        rows=tensor.rows,
        cols=tensor.cols,
        scale_cols=parts["scale"].shape[1],
        scale_values=_scale_values(fmt, tensor_inv) if fmt.scale.bits <= 8 else [],
        tensor_inv=0.0 if tensor_inv is None or fmt.scale.bits <= 8 else float(tensor_inv),
        parts={name: part.data_ptr() for name, part in read.items()},
    )
    return PackedWeight(
        handle=handle,
        rows=tensor.rows,
        cols=tensor.cols,
        num_bytes=tensor.num_bytes,
        kept=(*parts.values(), *read.values()),
    )


def _scale_values(fmt: BlockFormat, tensor_inv: Tensor | None) -> list[float]:
    """Return the factor of every scale code of one tensor, its second level included."""
    factors = scale_factor(torch.arange(2**fmt.scale.bits, dtype=torch.uint8), fmt, tensor_inv)
    if fmt.has_zero_code:
        factors[0] = 0.0  # scale code 0 means that the whole block is zero (arXiv 2510.14557)
    return factors.tolist()


def _sparse_parts(fmt: BlockFormat, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if fmt.sparse is None:
        return {}
    stored, columns = parts["sparse_values"], parts["sparse_columns"]
    is_fp8 = fmt.sparse.element is SparseElement.FP8
    values = decode(stored, E4M3) * parts["sparse_scale"] if is_fp8 else stored.to(torch.float32)
    name = "sparse_columns" if columns.dtype == torch.int32 else "sparse_columns_16"
    return {"sparse_offsets": parts["sparse_offsets"], name: columns, "sparse_values": values}
