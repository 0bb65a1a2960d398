"""FlatQuant: a Kronecker product of two small matrices flattens the input of each group, learned layer by layer.

x as [a, b] becomes left^T x right, with a b = cols and both near its square root; a scale of each channel comes first.
A row of the result spans all of the input: a transform that is no block's own.

Left out: clips of the inputs, for which a quantized layer has no place, and the transforms of keys and values.

Source: arXiv 2410.09426, section 3. The matrices are parameters themselves (the paper's "direct inversion"), not by
their singular values; they start as Hadamard matrices, or random rotations where a size is no power of two.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microscale.algorithms.contract import BlockProblem, BlockStep, GroupProblem
from microscale.algorithms.fit import adam
from microscale.algorithms.learned import LearnedTransform, is_seen, learn_groups
from microscale.algorithms.rotation import start_rotation
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError
from microscale.transforms import Transform, kronecker_transform, scale_transform


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatQuant(BlockStep):
    """Kronecker transforms at the learning rate ``lr`` over ``epochs`` of the calibration windows.

    ``diagonal`` learns a scale of each channel before, ``clip`` a bound for each block of the weights (``lr_clip``).
    """

    name: ClassVar[str] = "flatquant"
    source: ClassVar[str] = "arXiv 2410.09426 section 3"

    epochs: int = 15
    lr: float = 5e-3
    lr_clip: float = 5e-2
    diagonal: bool = True
    clip: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise RecipeError(f"flatquant: epochs is at least 0, got {self.epochs}")

    @property
    def wanted(self) -> Wanted | None:
        """How many tokens came by."""
        return Wanted.RANGE

    def learn(self, problem: BlockProblem) -> tuple[GroupProblem, ...]:
        """Return the groups with transforms and clips.

        Raises:
            CalibrationError: the loss left the finite numbers.
        """
        learners = [_Kronecker(group, self, problem.seed) for group in problem.groups if is_seen(group)]
        matrices = [matrix for learner in learners for matrix in learner.parameters]
        clips = [parameter for learner in learners for parameter in learner.clip_parameters]
        update = adam([(matrices, self.lr), (clips, self.lr_clip)])
        steps = self.epochs * len(problem.targets)
        return learn_groups(problem, learners, [*matrices, *clips], update, steps=steps, what=self.name)


def kronecker_sizes(cols: int) -> tuple[int, int]:
    """Return (a, b) with a * b = cols, a <= b and a as large as can be."""
    outer = next(size for size in range(math.isqrt(cols), 0, -1) if cols % size == 0)
    return outer, cols // outer


class _Kronecker(LearnedTransform):
    def __init__(self, group: GroupProblem, options: FlatQuant, seed: int) -> None:
        super().__init__(group)
        if options.clip:
            self.learn_clips()
        self.sizes = kronecker_sizes(group.cols)
        own = seed + zlib.crc32(group.layers[0].name.encode())
        device = self.weights[0].device
        self.left, self.right = (
            start_rotation(size, own + i).to(device, torch.float32).requires_grad_()
            for i, size in enumerate(self.sizes)
        )
        self.scale_log = torch.zeros(group.cols, device=device, requires_grad=options.diagonal)

    @property
    def parameters(self) -> list[Tensor]:
        """What the transform learns."""
        return [tensor for tensor in (self.left, self.right, self.scale_log) if tensor.requires_grad]

    def turn(self, inputs: Tensor) -> Tensor:
        """Return left^T (x scale) right."""
        grid = (inputs * self.scale_log.exp()).unflatten(-1, self.sizes)
        return (self.left.T @ (grid @ self.right)).flatten(-2)

    def turn_weight(self, weight: Tensor) -> Tensor:
        """Return left^-1 (w / scale) right^-T."""
        grid = (weight * (-self.scale_log).exp()).unflatten(-1, self.sizes)
        return (torch.linalg.inv(self.left) @ (grid @ torch.linalg.inv(self.right).T)).flatten(-2)

    def transforms(self) -> tuple[Transform, ...]:
        """Return the scale, where one was learned, and the product."""
        product = kronecker_transform(self.left.detach().clone(), self.right.detach().clone())
        if not self.scale_log.requires_grad:
            return (product,)
        return (scale_transform(self.scale_log.detach().exp()), product)
