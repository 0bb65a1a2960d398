"""rms_norm, silu_mul, hadamard and the four fused quantizations in plain torch: float32 throughout, one rounding."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from microscale.errors import ShapeError
from microscale.formats import Format
from microscale.kernels.checks import check_gather, check_hadamard, check_rms_norm, check_silu_mul, outside_message
from microscale.kernels.reference.quantize import quantize
from microscale.tensor import QuantizedTensor


def rms_norm(values: Float[Tensor, "... cols"], weight: Float[Tensor, "cols"], eps: float) -> Float[Tensor, "... cols"]:
    """Return values / sqrt(mean(values^2) + eps) * weight; see :func:`microscale.kernels.ops.rms_norm`."""
    check_rms_norm(values, weight, eps)
    wide = values.detach().to(torch.float32)
    inverse = (wide.square().mean(-1, keepdim=True) + eps).sqrt().reciprocal()
    return (wide * inverse * weight.detach().to(torch.float32)).to(values.dtype)


def silu_mul(gate: Float[Tensor, "..."], up: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return gate / (1 + exp(-gate)) * up; see :func:`microscale.kernels.ops.silu_mul`."""
    check_silu_mul(gate, up)
    wide = gate.detach().to(torch.float32)
    return (wide / ((-wide).exp() + 1) * up.detach().to(torch.float32)).to(gate.dtype)


def hadamard(
    values: Float[Tensor, "... cols"], size: int, signs: Float[Tensor, "cols"] | None = None
) -> Float[Tensor, "... cols"]:
    """Transform blocks of the last axis; see :func:`microscale.kernels.ops.hadamard` for the order of the sums."""
    check_hadamard(values, size, signs)
    wide = values.detach().to(torch.float32)
    if signs is not None:
        wide = wide * signs.detach()
    blocks = wide.unflatten(-1, (-1, size))
    distance = 1
    while distance < size:
        first, second = blocks.unflatten(-1, (-1, 2, distance)).unbind(-2)
        blocks = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        distance *= 2
    factor = 1 / blocks.new_tensor(math.sqrt(size))
    return (blocks * factor).flatten(-2).to(values.dtype)


def rms_norm_quantize(
    values: Float[Tensor, "... cols"], weight: Float[Tensor, "cols"], eps: float, fmt: Format
) -> QuantizedTensor:
    """Return quantize(rms_norm(values))."""
    return quantize(rms_norm(values, weight, eps), fmt)


def silu_mul_quantize(gate: Float[Tensor, "..."], up: Float[Tensor, "..."], fmt: Format) -> QuantizedTensor:
    """Return quantize(silu_mul(gate, up))."""
    return quantize(silu_mul(gate, up), fmt)


def gather_quantize(values: Float[Tensor, "... cols"], columns: Integer[Tensor, "n"], fmt: Format) -> QuantizedTensor:
    """Return quantize(values[..., columns])."""
    check_gather(values, columns)
    if bool(((columns < 0) | (columns >= values.shape[-1])).any()):
        raise ShapeError(outside_message(columns, values.shape[-1]))
    return quantize(values.detach().index_select(-1, columns), fmt)


def hadamard_quantize(
    values: Float[Tensor, "... cols"], size: int, fmt: Format, signs: Float[Tensor, "cols"] | None = None
) -> QuantizedTensor:
    """Return quantize(hadamard(values))."""
    return quantize(hadamard(values, size, signs), fmt)
