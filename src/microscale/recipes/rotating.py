"""Rotate the residual stream of a model as a step of a method says; what the model computes stays as it is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from microscale.algorithms.contract import ModelProblem, RotationProblem, RotationStep, as_it_is
from microscale.families.structure import FoldKind, ModelStructure, NormKind
from microscale.recipes.folding import check_rotation, keep_mean, rotate_residual, rotate_value
from microscale.recipes.matrices import matrix


def rotate_model(model: nn.Module, structure: ModelStructure, step: RotationStep, problem: ModelProblem | None) -> None:
    """Rotate the residual stream, and the values of attention where the step asks for it.

    ``problem`` is the model with fused norms, for a step that learns.

    Raises:
        ModelError: the residual stream of this model cannot be rotated.
    """
    check_rotation(structure)
    keeps_mean = structure.norm is NormKind.LAYER
    readers = (f"{block.name}.{name}" for block in structure.blocks for norm in block.norms for name in norm.readers)
    writers = (f"{block.name}.{name}" for block in structure.blocks for name in block.writers)
    with torch.enable_grad():
        rotation = step.rotation(
            RotationProblem(
                size=matrix(model, structure.entries[0]).shape[-2],
                readers=_layers(readers),
                writers=_layers(writers),
                keeps_mean=keeps_mean,
                admissible=keep_mean if keeps_mean else as_it_is,
                model=problem,
            )
        )
    rotate_residual(model, structure, rotation)
    rotate_values(model, structure, step)


def rotate_values(model: nn.Module, structure: ModelStructure, step: RotationStep) -> None:
    """Rotate the values of attention, where the step asks for it."""
    for index, block in enumerate(structure.blocks):
        folds = [group.fold for group in block.groups if group.fold is not None]
        rows = next((fold.rows for fold in folds if fold.kind is FoldKind.VALUE), None)
        turn = None if rows is None else step.head_rotation(rows.width, index)
        if turn is not None:
            rotate_value(model, block, turn)


def _layers(matrices: Iterable[str]) -> frozenset[str]:
    """Return the linear layers that matrices belong to."""
    return frozenset(name.removesuffix(".weight") for name in matrices)
