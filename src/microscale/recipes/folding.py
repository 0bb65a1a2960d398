"""Move scales and rotations between the weights of a model without changing what it computes.

What families/ knows about a model says where they can go. Everything is computed in float64 and stored in the dtype of
the weight, so in float32 and float64 models the function stays as it was, and in bfloat16 each fold rounds once.

Sources: scales into norms and linears as in SmoothQuant (arXiv 2211.10438, §4) and AWQ (arXiv 2306.00978, §3.2); the
rotation of the residual stream and of values as in QuaRot (arXiv 2404.00456, §4) and SpinQuant (arXiv 2405.16406, §3),
its R1 and R2; centring before LayerNorm as in SliceGPT (arXiv 2401.15024, §3.2).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from microscale.errors import ModelError, NonFiniteError, ShapeError
from microscale.families.structure import BlockStructure, Fold, FoldKind, LinearGroup, ModelStructure, NormKind, Signs
from microscale.nn.modules import untie
from microscale.recipes.matrices import (
    bias_of,
    centre_outputs,
    matrix,
    multiply_left,
    multiply_right,
    parameter_of,
    scale_inputs,
)

ORTHOGONAL_TOLERANCE = 1e-4
"""Largest entry of QᵀQ - I; a float32 matrix of thousands of columns stays below it."""


@torch.no_grad()
def fold_scale(model: nn.Module, block: BlockStructure, group: LinearGroup, scale: Float[Tensor, " in"]) -> None:
    """Make the input x of a group x / scale, and its weights W diag(scale).

    All matrices that read the same input are scaled, see :attr:`Fold.readers`. Values are shared by query heads: their
    scale must be the same for all heads that share them (:func:`shared_scale` makes it so).

    Raises:
        ModelError: the group has no fold, the layers are quantized already, or a negative scale before a ReLU.
        ShapeError: not one scale for each input, or different ones where they must be shared.
        NonFiniteError: a scale that is 0, NaN or Inf.
    """
    fold = group.fold
    if fold is None:
        raise ModelError(f"no scale can be folded before {block.name}.{group.linears[0]}: {group.role} has no fold")
    _check_scale(scale, fold, f"{block.name}.{group.linears[0]}")
    readers = [matrix(model, f"{block.name}.{name}") for name in fold.readers]
    width = readers[0].shape[-1]
    if scale.shape != (width,):
        raise ShapeError(f"{group.role} of {block.name} has {width} inputs, got scales of shape {list(scale.shape)}")
    wide = scale.to(device=readers[0].device, dtype=torch.float64)
    if not torch.equal(shared_scale(fold, wide), wide):
        raise ShapeError(f"{group.role} of {block.name}: query heads that share values need one scale (shared_scale)")
    if fold.norm is not None:
        _divide_norm(model.get_submodule(f"{block.name}.{fold.name}"), fold.norm, wide)
    else:
        _divide_rows(model, f"{block.name}.{fold.name}.weight", fold, wide)
    for weight in readers:
        scale_inputs(weight, wide)


def shared_scale(fold: Fold, scale: Float[Tensor, " in"]) -> Float[Tensor, " in"]:
    """Return the scale with one value for all query heads that read the same value channel: their geometric mean.

    Scales of other folds, and those that are shared already, come back as they are.
    """
    if fold.kind is not FoldKind.VALUE or fold.shared_by == 1:
        return scale
    assert fold.rows is not None
    heads = scale.reshape(fold.rows.heads, fold.shared_by, fold.rows.width)
    mean = heads.abs().log().mean(dim=1, keepdim=True).exp() * heads[:, :1].sign()
    is_shared = (heads == heads[:, :1]).all(dim=1, keepdim=True)
    return torch.where(is_shared, heads, mean.expand_as(heads)).reshape(-1)


def _check_scale(scale: Tensor, fold: Fold, name: str) -> None:
    if not bool(torch.isfinite(scale).all()) or bool((scale == 0).any()):
        raise NonFiniteError(f"scales before {name} must be finite and not 0")
    if fold.signs is Signs.POSITIVE and bool((scale < 0).any()):
        raise ModelError(f"scales before {name} must be positive: a ReLU lies between it and {fold.name}")


@torch.no_grad()
def fold_order(model: nn.Module, block: BlockStructure, group: LinearGroup, order: Int[Tensor, " in"]) -> None:
    """Make the input x of a group x[order], and its weights W[:, order]: numbers move, none changes.

    The rows and biases of the group's sources move, in each of their runs alike.

    Raises:
        ModelError: the group has no sources, or the layers are quantized already.
        ShapeError: an order that does not name each input once.
    """
    if not group.sources:
        raise ModelError(f"no order can be folded before {block.name}.{group.linears[0]}: {group.role} has no sources")
    readers = [matrix(model, f"{block.name}.{name}.weight") for name in group.linears]
    width = readers[0].shape[-1]
    order = order.to(device=readers[0].device, dtype=torch.int64)
    if not torch.equal(order.sort().values, torch.arange(width, device=order.device)):
        raise ShapeError(f"{group.role} of {block.name} has {width} inputs; an order must name each of them once")
    for name in (f"{block.name}.{source}.weight" for source in group.sources):
        weight, bias = matrix(model, name), bias_of(model, name)
        starts = torch.arange(0, weight.shape[-2], width, device=order.device)
        rows = (starts[:, None] + order).reshape(-1)
        weight.copy_(weight[rows])
        if bias is not None:
            bias.copy_(bias[rows])
    for weight in readers:
        weight.copy_(weight[:, order])


def _divide_norm(norm: nn.Module, kind: NormKind, scale: Tensor) -> None:
    offset = 1.0 if kind is NormKind.RMS_PLUS_ONE else 0.0
    weight = norm.get_parameter("weight").detach()
    weight.copy_((weight.to(torch.float64) + offset) / scale - offset)
    bias = parameter_of(norm, "bias")
    if bias is not None:
        bias.copy_(bias.to(torch.float64) / scale)


def _divide_rows(model: nn.Module, name: str, fold: Fold, scale: Tensor) -> None:
    """Divide the rows that make a group's input; of a shared value the scale of its first query head counts."""
    assert fold.rows is not None
    heads = scale.reshape(fold.rows.heads, fold.shared_by, fold.rows.width)
    divisor = heads[:, 0].reshape(-1)
    rows = torch.tensor(fold.rows.indices, device=scale.device)
    weight, bias = matrix(model, name), bias_of(model, name)
    weight[rows] = (weight[rows].to(torch.float64) / divisor[:, None]).to(weight.dtype)
    if bias is not None:
        bias[rows] = (bias[rows].to(torch.float64) / divisor).to(bias.dtype)


@torch.no_grad()
def fuse_norms(model: nn.Module, structure: ModelStructure) -> None:
    """Move the weight of every norm, and its bias where there is one, into the matrices that read it.

    A norm then only norms: its weight is 1 (0 where the model adds 1). A bias goes into the biases of the readers;
    where one of them has none, the norm keeps bias / weight. A tied head gets weights of its own first. Norms whose
    readers are not known (of heads, of what a layer adds, the last one of a model without a head) stay as they are.

    Raises:
        ModelError: a norm with a bias where its weight is 0, or the layers are quantized already.
    """
    assert structure.norm is not None or not any(block.norms for block in structure.blocks)
    for block in structure.blocks:
        for norm in block.norms:
            _fuse(model, f"{block.name}.{norm.name}", [f"{block.name}.{name}" for name in norm.readers], structure.norm)
    if structure.final_norm is not None and structure.head is not None:
        untie_head(model, structure)
        _fuse(model, structure.final_norm, [f"{structure.head}.weight"], structure.norm)


def _fuse(model: nn.Module, name: str, readers: list[str], kind: NormKind | None) -> None:
    norm = model.get_submodule(name)
    weight, bias = parameter_of(norm, "weight"), parameter_of(norm, "bias")
    if weight is None:
        return
    offset = 1.0 if kind is NormKind.RMS_PLUS_ONE else 0.0
    gain = weight.to(torch.float64) + offset
    if bias is not None and bool((bias != 0).any()):
        wide = bias.to(torch.float64)
        targets = [(bias_of(model, reader), matrix(model, reader)) for reader in readers]
        if all(target is not None for target, _ in targets):
            for target, reader in targets:
                assert target is not None
                target.copy_(target.to(torch.float64) + reader.to(torch.float64) @ wide)
            bias.zero_()
        elif bool((bias[gain == 0] != 0).any()):
            raise ModelError(f"{name} has a weight of 0 beside a bias, and {readers[0]} has no bias to take it")
        else:
            bias.copy_(torch.where(gain == 0, 0.0, wide / gain))
    for reader in readers:
        scale_inputs(matrix(model, reader), gain)
    weight.fill_(1.0 - offset)


def untie_head(model: Any, structure: ModelStructure) -> None:
    """Give the head weights of its own where it shares those of the embedding."""
    if structure.head is None:
        return
    head = model.get_submodule(structure.head)
    shared = [name for name in structure.embeddings if model.get_submodule(name).weight is head.weight]
    if shared:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        untie(model, {structure.head, *shared})
        model.config.get_text_config().tie_word_embeddings = False


@torch.no_grad()
def centre_residual(model: nn.Module, structure: ModelStructure) -> None:
    """Give every vector that is added to the residual stream the mean zero, which LayerNorm would subtract anyway.

    Raises:
        ModelError: the norms are no LayerNorms, or the stream is read without one.
    """
    if structure.norm is not NormKind.LAYER or structure.final_norm is None:
        raise ModelError(f"{structure.family} cannot be centred: no LayerNorm reads its residual stream")
    if structure.rotation_obstacle is not None:
        raise ModelError(f"the residual stream of this model cannot be centred: {structure.rotation_obstacle}")
    untie_head(model, structure)
    for name in _writers(structure):
        centre_outputs(matrix(model, name))
        bias = bias_of(model, name)
        if bias is not None:
            bias.copy_(bias.to(torch.float64) - bias.to(torch.float64).mean())


@torch.no_grad()
def rotate_residual(model: nn.Module, structure: ModelStructure, q: Float[Tensor, "hidden hidden"]) -> None:
    """Make every vector h of the residual stream qᵀ h: norms are fused, writers become qᵀ W, readers W q.

    LayerNorm subtracts a mean, which q would mix with the rest. In such models what is written is centred first, and q
    is followed by the reflection that brings the direction of the mean back to where it was; so nn.LayerNorm stays.

    Raises:
        ModelError: the family has no such rotation, with the reason; or the layers are quantized already.
        ShapeError: q is not orthogonal or not as wide as the model.
    """
    check_rotation(structure)
    assert structure.head is not None and structure.final_norm is not None
    for name in (*_writers(structure), *_readers(structure)):
        matrix(model, name)  # refuses quantized layers before anything is changed
    width = matrix(model, structure.entries[0]).shape[-2]
    rotation = _checked_rotation(q, (width, width)).to(matrix(model, structure.entries[0]).device)
    fuse_norms(model, structure)
    if structure.norm is NormKind.LAYER:
        centre_residual(model, structure)
        rotation = keep_mean(rotation)
    for name in _writers(structure):
        multiply_left(matrix(model, name), rotation.T)
        bias = bias_of(model, name)
        if bias is not None:
            bias.copy_(rotation.T @ bias.to(torch.float64))
    for block in structure.blocks:
        for norm in block.norms:
            _rotate_norm_bias(model.get_submodule(f"{block.name}.{norm.name}"), rotation)
    assert structure.final_norm is not None
    _rotate_norm_bias(model.get_submodule(structure.final_norm), rotation)
    for name in (*_readers(structure), f"{structure.head}.weight"):
        multiply_right(matrix(model, name), rotation)


def check_rotation(structure: ModelStructure) -> None:
    """Refuse models whose residual stream cannot be rotated.

    Raises:
        ModelError: the family has no such rotation, with the reason.
    """
    obstacle = rotation_obstacle(structure)
    if obstacle is not None:
        raise ModelError(f"the residual stream of this model cannot be rotated: {obstacle}")


def rotation_obstacle(structure: ModelStructure) -> str | None:
    """Return why the residual stream of a model cannot be rotated, or None."""
    if not structure.is_known:
        return "its family is of no record of ours"
    if structure.rotation_obstacle is not None:
        return structure.rotation_obstacle
    if structure.head is None or structure.final_norm is None:
        return f"{structure.family} has no last norm and head"
    return None


def keep_mean(q: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    """Return q times the reflection after which the vector of ones is mapped to itself."""
    width = q.shape[0]
    ones = torch.full((width,), width**-0.5, dtype=q.dtype, device=q.device)
    image = q.T @ ones
    normal = image - ones
    size = normal.norm()
    if size < 1e-12:
        return q
    normal = normal / size
    return q - 2.0 * torch.outer(q @ normal, normal)


def _rotate_norm_bias(norm: nn.Module, rotation: Tensor) -> None:
    bias = parameter_of(norm, "bias")
    if bias is not None:
        bias.copy_(rotation.T @ bias.to(torch.float64))


def _writers(structure: ModelStructure) -> list[str]:
    inner = (f"{block.name}.{name}" for block in structure.blocks for name in block.writers)
    return [*structure.entries, *inner]


def _readers(structure: ModelStructure) -> list[str]:
    return [f"{block.name}.{name}" for block in structure.blocks for norm in block.norms for name in norm.readers]


@torch.no_grad()
def rotate_value(model: nn.Module, block: BlockStructure, q_head: Float[Tensor, "*heads width width"]) -> None:
    """Make the value v of each head qᵀ v, and undo it in the output projection; ``heads`` are key-value heads.

    Raises:
        ModelError: the block has no value path that is known, or is quantized already.
        ShapeError: q_head is not orthogonal, or not as wide as a head, or of another number of heads.
    """
    group = next((g for g in block.groups if g.fold is not None and g.fold.kind is FoldKind.VALUE), None)
    if group is None:
        raise ModelError(f"{block.name} has no value path that is known, so its values cannot be rotated")
    fold = cast(Fold, group.fold)
    rows = fold.rows
    assert rows is not None
    shape = (rows.heads, rows.width, rows.width)
    rotation = _checked_rotation(q_head, shape[-q_head.ndim :] if q_head.ndim == 3 else shape[1:])
    name = f"{block.name}.{fold.name}.weight"
    weight, bias = matrix(model, name), bias_of(model, name)
    rotation = rotation.to(weight.device).expand(shape)
    indices = torch.tensor(rows.indices, device=weight.device)
    values = weight[indices].to(torch.float64).reshape(rows.heads, rows.width, -1)
    weight[indices] = (rotation.transpose(1, 2) @ values).reshape(len(indices), -1).to(weight.dtype)
    if bias is not None:
        inner = bias[indices].to(torch.float64).reshape(rows.heads, rows.width, 1)
        bias[indices] = (rotation.transpose(1, 2) @ inner).reshape(-1).to(bias.dtype)
    for reader in fold.readers:
        output = matrix(model, f"{block.name}.{reader}")
        heads = output.to(torch.float64).reshape(-1, rows.heads, fold.shared_by, rows.width)
        output.copy_(torch.einsum("ohsi,hij->ohsj", heads, rotation).reshape(output.shape))


def _checked_rotation(q: Tensor, shape: tuple[int, ...]) -> Float[Tensor, "*heads width width"]:
    if q.shape != shape:
        raise ShapeError(f"the rotation must have the shape {list(shape)}, got {list(q.shape)}")
    wide = q.to(torch.float64)
    unit = torch.eye(shape[-1], dtype=torch.float64, device=q.device)
    error = float((wide.transpose(-1, -2) @ wide - unit).abs().max())
    if not error <= ORTHOGONAL_TOLERANCE:
        raise ShapeError(f"the rotation is not orthogonal: QᵀQ differs from 1 by {error:.2g}")
    # One step of Newton and Schulz: what is orthogonal in float32 becomes so in float64. A length that is off by 1e-8
    # would be taken for a direction where the mean of LayerNorm is kept.
    return wide @ (1.5 * unit - 0.5 * (wide.transpose(-1, -2) @ wide))
