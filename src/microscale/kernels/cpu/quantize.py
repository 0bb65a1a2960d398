"""quantize, dequantize and fake_quantize by the compiled kernels: checks, memory, pointers, nothing else.

Bitwise equal to the reference (:mod:`microscale.kernels.reference`). Sparse tables and pairs keep torch for their
selection and take the kernels for their blocks. Left to the reference, with the reason from :func:`refusal`: tiles,
sub-group scales, elements of more than 8 bits, and percentiles of whole rows. So are tensors where the sign of a
stored zero depends on the order in which torch looks at +0 and -0; the kernels count such blocks of zero-point
formats, and the tensor goes to the reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.errors import KernelError, NonFiniteError
from microscale.formats import BlockFormat, Draw, Format, InfPolicy, NaNPolicy, PairFormat, SegmentedFormat
from microscale.formats.draw import part_draw
from microscale.kernels import reference
from microscale.kernels.checks import check_amax, check_values
from microscale.kernels.cpu import native
from microscale.kernels.cpu.descriptors import descriptor, drawn_descriptor, encode_refusal, storage_refusal
from microscale.kernels.cpu.enums import DTYPES
from microscale.kernels.cpu.memory import new_tensor
from microscale.kernels.reference.encode import float32_values, nonfinite_message, refuse_nonfinite
from microscale.kernels.reference.pair import PairCodec, dequantize_pair, quantize_pair
from microscale.kernels.reference.sparse import add_sparse, split_sparse
from microscale.layouts import part_specs
from microscale.layouts.row_major import grid_shape
from microscale.tensor import QuantizedTensor, join_segments


class _UndecidedError(Exception):
    """The kernels met blocks whose bits only the reference can tell."""


def quantize_refusal(fmt: Format) -> str | None:
    """Return why these functions cannot quantize to a format, or None where they can."""
    return next((reason for part in _block_formats(fmt) if (reason := encode_refusal(part))), None)


def dequantize_refusal(fmt: Format) -> str | None:
    """Return why these functions cannot dequantize a format, or None where they can."""
    return next((reason for part in _block_formats(fmt) if (reason := storage_refusal(part))), None)


def _block_formats(fmt: Format) -> tuple[BlockFormat, ...]:
    if isinstance(fmt, SegmentedFormat):
        return tuple(segment.format for segment in fmt.segments)
    return (fmt.low, fmt.high) if isinstance(fmt, PairFormat) else (fmt,)


def quantize(
    values: Float[Tensor, "..."],
    fmt: Format,
    *,
    amax: Float[Tensor, "..."] | None = None,
    draw: Draw | None = None,
    name: str = "the tensor",
) -> QuantizedTensor:
    """Quantize a tensor along its last axis; see :func:`microscale.kernels.ops.quantize` for the contract."""
    rows, cols = check_values(values, name)
    check_amax(amax, fmt, rows, cols, name)
    check_device(values, name)
    if isinstance(fmt, SegmentedFormat):
        pieces = [
            quantize(values[..., at], part, draw=part_draw(draw, index), name=name)
            for index, (part, at) in enumerate(fmt.places())
        ]
        return join_segments(pieces, fmt)
    matrix = values.detach()
    try:
        if isinstance(fmt, PairFormat) or fmt.sparse is not None:
            parts = _quantize_compound(matrix.reshape(rows, cols), fmt, amax, draw, name)
        else:
            parts = _quantize_blocks(matrix, fmt, rows, cols, amax, draw, name)
    except _UndecidedError:
        return reference.quantize(values, fmt, amax=amax, draw=draw, name=name)
    return QuantizedTensor(format=fmt, shape=tuple(values.shape), dtype=values.dtype, parts=parts)


def fake_quantize(
    values: Float[Tensor, "..."],
    fmt: Format,
    *,
    amax: Float[Tensor, "..."] | None = None,
    draw: Draw | None = None,
    name: str = "the tensor",
) -> Float[Tensor, "..."]:
    """Return dequantize(quantize(values)) without packing; the same numbers bit for bit."""
    if isinstance(fmt, PairFormat) or fmt.sparse is not None:
        return dequantize(quantize(values, fmt, amax=amax, draw=draw, name=name))
    rows, cols = check_values(values, name)
    check_amax(amax, fmt, rows, cols, name)
    check_device(values, name)
    if isinstance(fmt, SegmentedFormat):
        pieces = [
            fake_quantize(values[..., at], part, draw=part_draw(draw, index), name=name)
            for index, (part, at) in enumerate(fmt.places())
        ]
        return torch.cat(pieces, dim=-1)
    try:
        return _restore_blocks(values.detach(), fmt, rows, cols, amax, draw, name)
    except _UndecidedError:
        return reference.fake_quantize(values, fmt, amax=amax, draw=draw, name=name)


def dequantize(
    tensor: QuantizedTensor, dtype: torch.dtype | None = None, out: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """Return the tensor's values; see :func:`microscale.kernels.ops.dequantize` for the contract."""
    wanted, fmt = dtype or tensor.dtype, tensor.format
    rows, cols = tensor.rows, tensor.cols
    if wanted not in DTYPES:
        raise KernelError(f"the CPU kernels write float32, bfloat16 or float16, not {wanted}")
    for name, part in tensor.parts.items():
        check_device(part, f"part {name!r}")
    if isinstance(fmt, SegmentedFormat):
        joined = torch.cat([dequantize(segment, wanted) for segment in tensor.segments], dim=-1)
        return joined if out is None else out.copy_(joined)
    if isinstance(fmt, BlockFormat) and fmt.sparse is None:
        return _decode(tensor.parts, fmt, rows, cols, wanted, out).view(tensor.shape)
    if isinstance(fmt, PairFormat):
        matrix = dequantize_pair(tensor.parts, fmt, rows, cols, _PAIR_CODEC)
    else:
        matrix = _decode(tensor.parts, fmt, rows, cols, torch.float32)
    if fmt.sparse is not None:
        matrix = add_sparse(matrix, fmt.sparse, dict(tensor.parts))
    values = matrix.reshape(tensor.shape).to(wanted)
    return values if out is None else out.copy_(values)


def check_device(tensor: Tensor, name: str) -> None:
    """Refuse a tensor that is not on the CPU.

    Raises:
        KernelError: with its name and device.
    """
    if tensor.device.type != "cpu":
        raise KernelError(f"the CPU kernels take tensors on the CPU, but {name} is on {tensor.device}; move it there")


def _native_module() -> native.ModuleType:
    if native.NATIVE is None:
        raise KernelError(native.UNAVAILABLE or "the compiled CPU kernels are not installed")
    return native.NATIVE


def _quantize_compound(
    matrix: Tensor, fmt: BlockFormat | PairFormat, amax: Tensor | None, draw: Draw | None, name: str
) -> dict[str, Tensor]:
    """Sparse tables and pairs: torch selects, the kernels encode the blocks."""
    refuse_nonfinite(matrix, fmt, name)
    rows, cols = matrix.shape
    dense, sparse = float32_values(matrix, fmt), {}
    if fmt.sparse is not None:
        dense, sparse = split_sparse(dense, fmt.sparse, part_specs(fmt, (rows, cols))["sparse_columns"].dtype)
    if isinstance(fmt, PairFormat):
        return {**quantize_pair(dense, fmt, _PAIR_CODEC, draw), **sparse}
    return {**_quantize_blocks(dense, fmt, rows, cols, amax, draw, name), **sparse}


def _quantize_blocks(
    values: Tensor, fmt: BlockFormat, rows: int, cols: int, amax: Tensor | None, draw: Draw | None, name: str
) -> dict[str, Tensor]:
    specs = part_specs(fmt, (rows, cols))
    parts = {part: new_tensor(spec.shape, spec.dtype) for part, spec in specs.items() if not part.startswith("sparse_")}
    _encode(values, fmt, rows, cols, amax, draw, name, parts, None)
    return parts


def _restore_blocks(
    values: Tensor, fmt: BlockFormat, rows: int, cols: int, amax: Tensor | None, draw: Draw | None, name: str
) -> Float[Tensor, "..."]:
    result = new_tensor(values.shape, values.dtype)
    _encode(values, fmt, rows, cols, amax, draw, name, {}, result)
    return result


def _encode(
    values: Tensor,
    fmt: BlockFormat,
    rows: int,
    cols: int,
    amax: Tensor | None,
    draw: Draw | None,
    name: str,
    parts: Mapping[str, Tensor],
    restored: Tensor | None,
) -> None:
    """Run the kernel of quantize (into ``parts``) or of fake_quantize (into ``restored``)."""
    if rows * cols == 0:
        return
    values = values.resolve_neg().contiguous()
    blocks_amax, tensor_amax = _given_amax(fmt, rows, cols, amax)
    description = descriptor(fmt) if draw is None else drawn_descriptor(fmt, draw)
    num_nan, num_inf, num_undecided = _native_module().quantize(
        level=native.level(),
        format=ctypes.addressof(description),
        dtype=DTYPES[values.dtype],
        values=values.data_ptr(),
        rows=rows,
        cols=cols,
        amax=address(blocks_amax),
        tensor_amax=address(tensor_amax),
        tensor_inv=address(parts.get("tensor_inv_scale")),
        restored=address(restored),
        **block_addresses(parts),
        threads=native.num_threads(),
    )
    check_counts(fmt, name, rows * cols, num_nan, num_inf)
    if num_undecided:
        raise _UndecidedError


def check_counts(fmt: BlockFormat, name: str, count: int, num_nan: int, num_inf: int) -> None:
    """Refuse the NaN and Inf that a kernel has counted, under the policy ``nan_raise``.

    Raises:
        NonFiniteError: with the name and the count.
    """
    if fmt.nan_policy is not NaNPolicy.RAISE:
        return
    num_bad = num_nan if fmt.inf_policy is InfPolicy.SATURATE else num_nan + num_inf
    if num_bad:
        raise NonFiniteError(nonfinite_message(name, num_bad, count))


def _given_amax(fmt: BlockFormat, rows: int, cols: int, amax: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return a given amax as one number for each block, or as the tensor's own."""
    if amax is None:
        return None, None
    if fmt.tensor_scale is not None:
        return None, amax.amax().to("cpu", torch.float32)
    return amax.to("cpu", torch.float32).expand(grid_shape(fmt.block, rows, cols)).contiguous(), None


def address(tensor: Tensor | None) -> int:
    """Return the pointer of a tensor, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def block_addresses(parts: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the pointers of the parts that every block has, 0 for those that are not there."""
    return {name: address(parts.get(name)) for name in ("codes", "scale", "index", "zero_point")}


def _decode(
    parts: Mapping[str, Tensor], fmt: BlockFormat, rows: int, cols: int, dtype: torch.dtype, out: Tensor | None = None
) -> Float[Tensor, "rows cols"]:
    result = new_tensor((rows, cols), dtype) if out is None else out.view(rows, cols)
    if rows * cols == 0:
        return result
    own = {name: part.contiguous() for name, part in parts.items()}
    _native_module().dequantize(
        level=native.level(),
        format=ctypes.addressof(descriptor(fmt)),
        dtype=DTYPES[dtype],
        rows=rows,
        cols=cols,
        tensor_inv=address(own.get("tensor_inv_scale")),
        restored=result.data_ptr(),
        **block_addresses(own),
        threads=native.num_threads(),
    )
    return result


def _encode_stream(stream: Tensor, fmt: BlockFormat, draw: Draw | None) -> dict[str, Tensor]:
    return _quantize_blocks(stream, fmt, stream.shape[0], stream.shape[1], None, draw, "the tensor")


def _restore_lines(lines: Tensor, fmt: BlockFormat, draw: Draw | None) -> Float[Tensor, "lines size"]:
    return _restore_blocks(lines, fmt, lines.shape[0], lines.shape[1], None, draw, "the tensor")


def _decode_stream(parts: Mapping[str, Tensor], fmt: BlockFormat, rows: int, cols: int) -> Float[Tensor, "rows cols"]:
    return _decode(parts, fmt, rows, cols, torch.float32)


_PAIR_CODEC = PairCodec(encode=_encode_stream, restore=_restore_lines, decode=_decode_stream)
