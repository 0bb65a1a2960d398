"""The operations of a decoder in plain torch on any device; see :mod:`microscale.kernels.decoder_ops`.

They compute in float32 and round once. The cache is row_major: keys and values [kv_heads, capacity, head_dim], in the
dtype that it stores; numbers of a format lie there as the float32 numbers that they stand for.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from microscale.kernels.operands import CacheLayout, Combine, Gate, KeyValueCache, Rotation, WeightGroup
from microscale.kernels.reference.fused import rms_norm, silu_mul
from microscale.kernels.reference.quantize import fake_quantize, linear
from microscale.layouts.row_major import NAME as ROW_MAJOR


def _allocate(
    capacity: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    shape = (kv_heads, capacity, head_dim)
    return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)


CACHE = CacheLayout(name=ROW_MAJOR, span=1, allocate=_allocate, read=lambda cache: (cache.keys, cache.values))


def add_rms_norm(residual: Tensor, added: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """See :func:`microscale.kernels.decoder_ops.add_rms_norm`."""
    if added is not None:
        residual.add_(added)
    out.copy_(rms_norm(residual, weight, eps))


def store_heads(heads: Tensor, cache: KeyValueCache, rotation: Rotation) -> None:
    """See :func:`microscale.kernels.decoder_ops.store_heads`."""
    split = heads.unflatten(-1, (-1, cache.head_dim))
    num_heads = split.shape[1] - 2 * cache.kv_heads
    queries, keys, values = split.split([num_heads, cache.kv_heads, cache.kv_heads], dim=1)
    positions = cache.length + torch.arange(heads.shape[0], device=heads.device)
    queries.copy_(_turned(queries, rotation.query_norm, rotation, positions))
    turned = _turned(keys, rotation.key_norm, rotation, positions)
    for where, found in ((cache.keys, turned), (cache.values, values.to(torch.float32))):
        if not isinstance(cache.stored, torch.dtype) and found.numel():
            found = fake_quantize(found, cache.stored, name="keys and values")
        where.index_copy_(1, positions, found.transpose(0, 1).to(where.dtype))


def _turned(
    heads: Float[Tensor, "rows heads head_dim"], norm: Tensor | None, rotation: Rotation, positions: Tensor
) -> Float[Tensor, "rows heads head_dim"]:
    wide = heads.to(torch.float32)
    if norm is not None:
        wide = rms_norm(wide, norm, rotation.eps)
    first, second = wide.chunk(2, dim=-1)
    cosines, sines = (table[positions].unsqueeze(1) for table in (rotation.cosines, rotation.sines))
    return wide * cosines + torch.cat([-second, first], dim=-1) * sines


def attend(heads: Tensor, cache: KeyValueCache, out: Tensor, scale: float, window: int | None) -> None:
    """See :func:`microscale.kernels.decoder_ops.attend`."""
    rows = heads.shape[0]
    num_heads = heads.shape[1] // cache.head_dim - 2 * cache.kv_heads
    queries = heads[:, : num_heads * cache.head_dim].to(torch.float32)
    grouped = queries.unflatten(-1, (cache.kv_heads, -1, cache.head_dim))
    length = int(cache.length)
    keys, values = (table[:, : length + rows].to(torch.float32) for table in (cache.keys, cache.values))
    scores = torch.einsum("rkgd,kpd->kgrp", grouped, keys) * scale
    weights = scores.masked_fill(~_seen(rows, length, window, heads.device), -math.inf).softmax(-1)
    out.copy_(torch.einsum("kgrp,kpd->rkgd", weights, values).flatten(1))


def _seen(rows: int, length: int, window: int | None, device: torch.device) -> Bool[Tensor, "rows positions"]:
    own = length + torch.arange(rows, device=device)[:, None]
    places = torch.arange(length + rows, device=device)
    return (places <= own) & (places > own - (window or length + rows + 1))


def gate(pairs: Tensor, out: Tensor, kind: Gate) -> None:
    """See :func:`microscale.kernels.decoder_ops.gate`."""
    first, second = pairs.to(torch.float32).chunk(2, dim=-1)
    z = first if kind is Gate.SILU else 2 * math.sqrt(2 / math.pi) * (first + 0.044715 * first**3)
    out.copy_(first * torch.sigmoid(z) * second)


def linear_dense(inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See :func:`microscale.kernels.decoder_ops.linear_dense`."""
    out.copy_(functional.linear(inputs.to(torch.float32), weight.to(torch.float32), bias))


def linear_group(inputs: Tensor, group: WeightGroup, out: Tensor) -> None:
    """See :func:`microscale.kernels.decoder_ops.linear_group`."""
    pairs = zip(group.weights, group.biases, strict=True)
    found = [linear(inputs, weight, bias, group.activations) for weight, bias in pairs]
    out.copy_(silu_mul(*found) if group.combine is Combine.SILU_MUL else torch.cat(found, dim=-1))


def largest_index(numbers: Float[Tensor, "count"]) -> int:
    """See :func:`microscale.kernels.decoder_ops.largest_index`."""
    return int(numbers.argmax())
