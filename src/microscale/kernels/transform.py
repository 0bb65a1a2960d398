"""Apply the online transforms of :mod:`microscale.transforms` to inputs, weights and second moments.

Exactness: ``apply_transforms`` computes in the dtype of the inputs (block Hadamard by the operation ``hadamard``, in
float32 and rounded once). ``transform_weight`` solves in float64 and rounds once to float32, so that x' W'^T = x W^T up
to the rounding of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.errors import NonFiniteError, ShapeError
from microscale.kernels.checks import HADAMARD_SIZES
from microscale.kernels.ops import hadamard
from microscale.transforms import Transform, TransformKind


def apply_transforms(inputs: Float[Tensor, "... cols"], transforms: Sequence[Transform]) -> Float[Tensor, "... cols"]:
    """Return x M of a chain of transforms, first one first, in the dtype of the inputs.

    Special values: NaN and Inf spread over their block, or over the whole row (kronecker).

    Raises:
        ShapeError: inputs of another width.
    """
    for transform in transforms:
        if inputs.shape[-1] != transform.cols:
            raise ShapeError(f"transform {transform.spec} is for {transform.cols} columns, got {inputs.shape[-1]}")
        inputs = _apply(inputs, transform)
    return inputs


def _apply(inputs: Tensor, transform: Transform) -> Tensor:
    parts, size = transform.parts, transform.spec.size
    match transform.spec.kind:
        case TransformKind.SCALE:
            return inputs * parts["scale"].to(inputs.dtype)
        case TransformKind.PERMUTE:
            is_learning = torch.is_grad_enabled() and inputs.requires_grad
            return _Permuted.apply(inputs, parts["order"]) if is_learning else inputs.index_select(-1, parts["order"])
        case TransformKind.HADAMARD:
            is_learning = torch.is_grad_enabled() and inputs.requires_grad
            if is_learning or size not in HADAMARD_SIZES:  # the operation has no gradient and no small sizes
                return block_product(inputs, hadamard_matrix(size, inputs).unsqueeze(0))
            return hadamard(inputs, size)
        case TransformKind.BLOCK:
            return block_product(inputs, parts["matrix"].to(inputs.dtype))
        case TransformKind.KRONECKER:
            grid = inputs.unflatten(-1, (transform.spec.outer, size))
            left, right = parts["left"].to(inputs.dtype), parts["right"].to(inputs.dtype)
            return (left.T @ (grid @ right)).flatten(-2)


class _Permuted(torch.autograd.Function):
    """A gather whose gradient is one too, where that of index_select would be sums in any order of time."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return inputs.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradients[0].index_select(-1, order.argsort()), None


def block_product(
    inputs: Float[Tensor, "... cols"], matrix: Float[Tensor, "blocks size size"]
) -> Float[Tensor, "... cols"]:
    """Return every block of ``size`` columns times its matrix, or times the one matrix of all blocks."""
    size = matrix.shape[-1]
    blocks = inputs.reshape(-1, inputs.shape[-1] // size, size)
    if matrix.shape[0] == 1:
        return (blocks @ matrix[0]).reshape(inputs.shape)
    return torch.bmm(blocks.transpose(0, 1), matrix).transpose(0, 1).reshape(inputs.shape)


def hadamard_matrix(size: int, like: Tensor | None = None) -> Float[Tensor, "size size"]:
    """Return the Sylvester Hadamard matrix over sqrt(size), which is symmetric and its own inverse."""
    matrix = torch.ones(1, 1) if like is None else like.new_ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / math.sqrt(size)


def transform_weight(weight: Float[Tensor, "rows cols"], transform: Transform) -> Float[Tensor, "rows cols"]:
    """Return W' = W M^-T in float32.

    Raises:
        ShapeError: a singular transform, or a weight of another width.
        NonFiniteError: NaN or Inf in the weight.
    """
    if weight.shape[-1] != transform.cols:
        raise ShapeError(f"transform {transform.spec} is for {transform.cols} columns, got {weight.shape[-1]}")
    wide = weight.to(torch.float64)
    parts, size = transform.parts, transform.spec.size
    match transform.spec.kind:
        case TransformKind.SCALE:
            result = wide / parts["scale"].to(torch.float64)
        case TransformKind.PERMUTE:
            result = wide.index_select(-1, parts["order"])
        case TransformKind.HADAMARD:
            result = block_product(wide, hadamard_matrix(size, wide).unsqueeze(0))
        case TransformKind.BLOCK:
            result = block_product(wide, _inverse(parts["matrix"]).transpose(-1, -2))
        case TransformKind.KRONECKER:
            left, right = _inverse(parts["left"]), _inverse(parts["right"])
            result = (left @ wide.unflatten(-1, (transform.spec.outer, size)) @ right.T).flatten(-2)
    if not bool(torch.isfinite(result).all()):
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(
                f"a weight holds NaN or Inf, which transform {transform.spec} would spread over the numbers that it"
                " mixes; mend the model, or take a method without transforms"
            )
        raise ShapeError(f"transform {transform.spec} is singular; its inverse is not finite")
    return result.to(torch.float32)


def restore_weight(target: Float[Tensor, "rows cols"], transforms: Sequence[Transform]) -> Float[Tensor, "rows cols"]:
    """Return the W whose W M^-T is ``target`` for a chain of transforms: target M^T, in float32.

    Without transforms it is ``target`` itself; a permutation is undone exactly.
    """
    for transform in reversed(transforms):
        target = _restored(target.to(torch.float64), transform).to(torch.float32)
    return target


def _restored(wide: Tensor, transform: Transform) -> Tensor:
    parts, size = transform.parts, transform.spec.size
    match transform.spec.kind:
        case TransformKind.SCALE:
            return wide * parts["scale"].to(torch.float64)
        case TransformKind.PERMUTE:
            return wide.index_select(-1, parts["order"].argsort())
        case TransformKind.HADAMARD:
            return block_product(wide, hadamard_matrix(size, wide).unsqueeze(0))
        case TransformKind.BLOCK:
            return block_product(wide, parts["matrix"].to(torch.float64).transpose(-1, -2))
        case TransformKind.KRONECKER:
            left, right = parts["left"].to(torch.float64), parts["right"].to(torch.float64)
            return (left @ wide.unflatten(-1, (transform.spec.outer, size)) @ right.T).flatten(-2)


def _inverse(matrix: Tensor) -> Tensor:
    try:
        return torch.linalg.inv(matrix.to(torch.float64))
    except RuntimeError as error:
        raise ShapeError(f"a transform's matrix is singular: {error}") from None


def transform_second_moment(moment: Float[Tensor, "cols cols"], transform: Transform) -> Float[Tensor, "cols cols"]:
    """Return M^T S M, the second moment of x' where S is that of x."""
    half = _apply(moment, transform)
    return _apply(half.T.contiguous(), transform).T.contiguous()
