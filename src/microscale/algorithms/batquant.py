"""BATQuant: an affine transform for each block of the format, learned from the outputs of a decoder layer.

A transform that is no wider than a block cannot carry an outlier into another block, and one that is not bound to be a
rotation fits the block it has. With ``gpk`` the matrix of block i is the Kronecker product of a private [4, 4] matrix
and one [8, 8] matrix that all blocks share; at run time it is a matrix for each block all the same.

Left out: clips of the inputs (the paper learns one for each block), for which a quantized layer has no place; what was
learned of the weights' clips goes into the step that rounds, GPTQ in the paper.

Source: arXiv 2603.16590. Which factor of the Kronecker product is shared, and the start from a Hadamard matrix, are our
own choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microscale.algorithms.contract import BlockProblem, BlockStep, GroupProblem
from microscale.algorithms.fit import adam
from microscale.algorithms.hadamard import fitting_size
from microscale.algorithms.learned import LearnedTransform, is_seen, learn_groups
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError
from microscale.kernels.transform import block_product, hadamard_matrix
from microscale.transforms import Transform, block_transform

MODES = ("block", "shared", "gpk")
SHARED_SIZE = 8
"""Size of the matrix that all blocks share in mode gpk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatQuant(BlockStep):
    """Block transforms of ``size`` with learning rate ``lr`` over ``epochs`` of the calibration windows.

    ``mode``: ``block`` (a matrix for each block), ``shared`` (one for all) or ``gpk``. ``clip`` learns a bound for each
    block of the weights, at the rate ``lr_clip``.
    """

    name: ClassVar[str] = "batquant"
    source: ClassVar[str] = "arXiv 2603.16590"

    epochs: int = 5
    lr: float = 2e-3
    lr_clip: float = 1e-2
    size: int = 32
    mode: str = "block"
    clip: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RecipeError(f"batquant: mode is one of {', '.join(MODES)}, got {self.mode!r}")
        if self.epochs < 0 or self.size not in (16, 32, 64, 128):
            raise RecipeError(f"batquant: epochs >= 0, size 16, 32, 64 or 128; got {self.epochs} and {self.size}")

    @property
    def wanted(self) -> Wanted | None:
        """How many tokens came by."""
        return Wanted.RANGE

    def learn(self, problem: BlockProblem) -> tuple[GroupProblem, ...]:
        """Return the groups with block transforms and clips.

        Raises:
            CalibrationError: the loss left the finite numbers.
        """
        groups = [group for group in problem.groups if is_seen(group) and fitting_size(group.cols, self.size) > 1]
        learners = [_BlockMatrices(group, self) for group in groups]
        matrices = [matrix for learner in learners for matrix in learner.matrices]
        clips = [parameter for learner in learners for parameter in learner.clip_parameters]
        update = adam([(matrices, self.lr), (clips, self.lr_clip)])
        steps = self.epochs * len(problem.targets)
        return learn_groups(problem, learners, [*matrices, *clips], update, steps=steps, what=self.name)


class _BlockMatrices(LearnedTransform):
    def __init__(self, group: GroupProblem, options: BatQuant) -> None:
        super().__init__(group)
        if options.clip:
            self.learn_clips()
        self.size = fitting_size(group.cols, options.size)
        count = 1 if options.mode == "shared" else group.cols // self.size
        inner = min(SHARED_SIZE, self.size) if options.mode == "gpk" else 1
        like = self.weights[0]
        private = hadamard_matrix(self.size // inner, like).repeat(count, 1, 1)
        self.matrices = [private.requires_grad_()]
        if inner > 1:
            self.matrices.append(hadamard_matrix(inner, like).unsqueeze(0).requires_grad_())

    @property
    def matrix(self) -> Tensor:
        """The matrix of each block, or of all."""
        private = self.matrices[0]
        if len(self.matrices) == 1:
            return private
        return torch.einsum("kab,cd->kacbd", private, self.matrices[1][0]).reshape(len(private), self.size, self.size)

    def turn(self, inputs: Tensor) -> Tensor:
        """Return every block times its matrix."""
        return block_product(inputs, self.matrix)

    def turn_weight(self, weight: Tensor) -> Tensor:
        """Return every block times the inverse, transposed."""
        return block_product(weight, torch.linalg.inv(self.matrix).transpose(-1, -2))

    def transforms(self) -> tuple[Transform, ...]:
        """Return the block transform."""
        return (block_transform(self.matrix.detach().clone(), self.group.cols),)
