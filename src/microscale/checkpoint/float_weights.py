"""Weights that other tools have quantized, as the float weights that they stand for: FP8, INT8, INT4 and 4-bit floats.

One finder for each kind of file: from the tensor tables of a checkpoint to a :class:`FloatWeight` for each weight. What
is computed is what the tool's own dequantization computes, in float32.

Sources of the layouts: DeepSeek-V3's FP8 files (``weight_scale_inv`` multiplies, whatever its name says); the
compressors of compressed-tensors 0.20; ModelOpt's unified checkpoints. GPTQ, AWQ and bitsandbytes: :mod:`float_packed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from microscale.checkpoint.schema import TensorInfo
from microscale.errors import CheckpointError
from microscale.formats.codec import decode
from microscale.formats.elements import E2M1

Load = Callable[[str], Tensor]
"""Reads a tensor of the file by its name."""
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatWeight:
    """A weight with its shape, the tensors of the file that it is made of, and what makes it of them (float32)."""

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    make: Callable[[Load], Tensor]


def fp8_weights(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, FloatWeight]:
    """Find FP8 tensors that have a scale for the tensor, for each row or for each block.

    ``weight_block_size`` says how large a block is. A stacked tensor has scales for each of its matrices.

    Raises:
        CheckpointError: scales that do not fit.
    """
    blocks = config.get("weight_block_size")
    found: dict[str, FloatWeight] = {}
    for name, info in infos.items():
        if info.dtype not in FP8:
            continue
        scale = next((name + end for end in ("_scale_inv", "_scale") if name + end in infos), None)
        found[name] = _scaled(name, info, scale, infos, blocks)
    return found


def _scaled(
    name: str, info: TensorInfo, scale: str | None, infos: Mapping[str, TensorInfo], blocks: Sequence[int] | None
) -> FloatWeight:
    """Return weight * scale, minus a zero point before that where the file has one."""
    zero = f"{name}_zero_point"
    parts = [part for part in (name, scale, zero) if part is not None and part in infos]
    if scale is not None:
        check_scale(name, info.shape, infos[scale].shape, blocks)

    def make(load: Load) -> Tensor:
        values = load(name).to(torch.float32)
        if zero in parts:
            values = values - spread(load(zero).to(torch.float32), info.shape, blocks)
        return values if scale is None else values * spread(load(scale).to(torch.float32), info.shape, blocks)

    return FloatWeight(shape=info.shape, parts=tuple(parts), make=make)


def block_of(shape: Sequence[int], scale: Sequence[int], blocks: Sequence[int] | None) -> list[int] | None:
    """Return how many values along each dimension share a scale, or None where scales do not fit a weight.

    One scale serves the tensor; a list of scales serves the rows.
    """
    if math.prod(scale) == 1:
        return list(shape)
    if len(scale) == 1 and scale[0] == shape[-2]:
        scale = (*scale, 1)
    if len(scale) != len(shape):
        return None
    own = [1] * (len(shape) - 2) + list(blocks) if blocks is not None and len(blocks) == 2 else None
    sizes: list[int] = []
    for place, (length, count) in enumerate(zip(shape, scale, strict=True)):
        if count == 1 or count == length:
            sizes.append(length // count)
        elif own is not None and count == -(-length // own[place]):
            sizes.append(own[place])
        elif length % count == 0:
            sizes.append(length // count)
        else:
            return None
    return sizes


def check_scale(name: str, shape: Sequence[int], scale: Sequence[int], blocks: Sequence[int] | None) -> None:
    """Refuse scales that do not fit a weight.

    Raises:
        CheckpointError: with both shapes.
    """
    if len(shape) < 2 or block_of(shape, scale, blocks) is None:
        raise CheckpointError(
            f"tensor {name!r} of shape {list(shape)} has scales of shape {list(scale)}, which do not fit"
        )


def spread(scale: Float[Tensor, "..."], shape: Sequence[int], blocks: Sequence[int] | None) -> Float[Tensor, "..."]:
    """Return scales as large as the weight, each repeated over its block."""
    sizes = block_of(shape, scale.shape, blocks)
    assert sizes is not None
    if scale.numel() == 1:
        return scale.reshape(1)
    if scale.ndim == 1:
        scale = scale.unsqueeze(-1)
    for place, (size, length) in enumerate(zip(sizes, shape, strict=True)):
        if scale.shape[place] > 1:
            scale = scale.repeat_interleave(size, place).narrow(place, 0, length)
    return scale


def compressed_weights(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, FloatWeight]:
    """Find the weights of compressed-tensors: FP8, INT8, packed INT4 and INT8, NVFP4 and MX.

    Raises:
        CheckpointError: scales or packed words that do not fit, or a sparse file.
    """
    groups = [group for group in config.get("config_groups", {}).values() if isinstance(group, dict)]
    blocks = next((b for g in groups if (b := (g.get("weights") or {}).get("block_structure")) is not None), None)
    sparse = config.get("sparsity_config") or {}
    if sparse.get("format", "dense") != "dense":
        raise CheckpointError(f"the file is sparse ({sparse['format']}), which microscale does not read")
    bits = {int(g["weights"]["num_bits"]) for g in groups if (g.get("weights") or {}).get("type") == "int"}
    found: dict[str, FloatWeight] = {}
    for name, info in infos.items():
        if name.endswith(".weight") and f"{name}_scale" in infos:
            is_mx = infos[f"{name}_scale"].dtype == torch.uint8
            found[name] = _mx(name, info) if is_mx else _scaled(name, info, f"{name}_scale", infos, blocks)
        elif name.endswith(".weight_packed"):
            weight = name.removesuffix("_packed")
            if info.dtype == torch.uint8:
                found[weight] = _four_bit_floats(weight, name, info, infos)
            else:
                found[weight] = _packed_integers(weight, info, infos, bits)
    return found


def _mx(name: str, info: TensorInfo) -> FloatWeight:
    def make(load: Load) -> Tensor:
        scale = exponent_scale(load(f"{name}_scale"))
        return load(name).to(torch.float32) * spread(scale, info.shape, None)

    return FloatWeight(shape=info.shape, parts=(name, f"{name}_scale"), make=make)


def exponent_scale(codes: Integer[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the powers of two that E8M0 codes stand for; 255 is NaN."""
    return codes.view(torch.float8_e8m0fnu).to(torch.float32)


def four_bits(packed: Integer[Tensor, "rows half"]) -> Float[Tensor, "rows cols"]:
    """Return the E2M1 numbers of two codes a byte, the first in the low nibble."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return decode(codes, E2M1)


def _four_bit_floats(weight: str, packed: str, info: TensorInfo, infos: Mapping[str, TensorInfo]) -> FloatWeight:
    """Return MXFP4 or NVFP4: codes times the block's scale, over the divisor of the tensor where there is one."""
    scale, whole = f"{weight}_scale", f"{weight}_global_scale"
    shape = (*info.shape[:-1], info.shape[-1] * 2)
    if scale not in infos:
        raise CheckpointError(f"tensor {packed!r} has no {scale!r}; the checkpoint is incomplete")
    check_scale(weight, shape, infos[scale].shape, None)
    parts = tuple(part for part in (packed, scale, whole) if part in infos)

    def make(load: Load) -> Tensor:
        stored = load(scale)
        factor = exponent_scale(stored) if stored.dtype == torch.uint8 else stored.to(torch.float32)
        if whole in parts:
            factor = factor / load(whole).to(torch.float32)
        return four_bits(load(packed)) * spread(factor, shape, None)

    return FloatWeight(shape=shape, parts=parts, make=make)


def _packed_integers(weight: str, info: TensorInfo, infos: Mapping[str, TensorInfo], bits: set[int]) -> FloatWeight:
    """Return INT4 or INT8 in words of 32 bits, the first value lowest, all moved up by half their range."""
    scale, zero, order = (f"{weight}_{end}" for end in ("scale", "zero_point", "g_idx"))
    if scale not in infos or len(info.shape) != 2:
        raise CheckpointError(f"tensor {weight}_packed has no {scale!r}; the checkpoint is incomplete")
    rows, words = info.shape
    parts = tuple(part for part in (f"{weight}_packed", f"{weight}_shape", scale, zero, order) if part in infos)

    def width(load: Load) -> int:
        return int(load(f"{weight}_shape")[-1]) if f"{weight}_shape" in parts else words * 32 // min(bits)

    cols = words * 32 // min(bits) if len(bits) == 1 else 0
    if not cols or len(bits) != 1:
        raise CheckpointError(f"{weight!r}: packed integers need one width in bits, the config has {sorted(bits)}")
    (size,) = bits
    groups = infos[scale].shape[-1]

    def make(load: Load) -> Tensor:
        true = width(load)
        values = unpacked(load(f"{weight}_packed"), size)[:, :true].to(torch.float32) - 2 ** (size - 1)
        place = torch.arange(true) // -(-true // groups)
        if order in parts:
            place = load(order).to(torch.int64)
        if zero in parts:
            points = load(zero)
            if points.dtype == torch.int32 and points.shape != infos[scale].shape:
                points = unpacked(points.T.contiguous(), size).T[:rows].to(torch.float32) - 2 ** (size - 1)
            values = values - points.to(torch.float32)[:, place]
        return values * load(scale).to(torch.float32)[:, place]

    return FloatWeight(shape=(rows, cols), parts=parts, make=make)


def unpacked(words: Integer[Tensor, "rows words"], bits: int) -> Integer[Tensor, "rows cols"]:
    """Return the unsigned integers in words of 32 bits, the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits)
    return ((words.to(torch.int64).unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def modelopt_weights(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, FloatWeight]:
    """Find the weights of NVIDIA ModelOpt: FP8 (of tensors or rows), NVFP4, MXFP4 and MXFP8.

    A ``pre_quant_scale`` (of AWQ) multiplies the inputs, and so here the columns of the weight.
    """
    found: dict[str, FloatWeight] = {}
    for name, info in infos.items():
        if f"{name}_scale" not in infos:
            continue
        scale, second = f"{name}_scale", f"{name}_scale_2"
        if info.dtype == torch.uint8:
            weight = _modelopt_four_bits(name, info, infos)
        elif infos[scale].dtype == torch.uint8:
            weight = _mx(name, info)
        else:
            weight = _scaled(name, info, scale, infos, config.get("weight_block_size"))
        del second
        found[name] = _behind_scaled_inputs(name, weight, infos)
    return found


def _modelopt_four_bits(name: str, info: TensorInfo, infos: Mapping[str, TensorInfo]) -> FloatWeight:
    scale, second = f"{name}_scale", f"{name}_scale_2"
    shape = (*info.shape[:-1], info.shape[-1] * 2)
    check_scale(name, shape, infos[scale].shape, None)
    parts = tuple(part for part in (name, scale, second) if part in infos)

    def make(load: Load) -> Tensor:
        stored = load(scale)
        factor = exponent_scale(stored) if stored.dtype == torch.uint8 else stored.to(torch.float32)
        if second in parts:
            factor = factor * spread(load(second).to(torch.float32), (*shape[:-1], 1), None)
        return four_bits(load(name)) * spread(factor, shape, None)

    return FloatWeight(shape=shape, parts=parts, make=make)


def _behind_scaled_inputs(name: str, weight: FloatWeight, infos: Mapping[str, TensorInfo]) -> FloatWeight:
    before = f"{name.removesuffix('weight')}pre_quant_scale"
    if before not in infos:
        return weight
    return FloatWeight(
        shape=weight.shape,
        parts=(*weight.parts, before),
        make=lambda load: weight.make(load) * load(before).to(torch.float32),
    )
