"""BlockRotation: rotate the residual stream inside of blocks, folded into the weights of the whole model.

QuaRot's rotation mixes all channels, so that each outlier reaches every block and makes each block scale that is a
power of two coarser. A rotation that mixes the channels of one block alone leaves the other blocks as they were; it is
that of ``hadamard`` without anything left to do at run time, for the inputs that come from the residual stream and,
with ``values``, for the output projection of attention. The inputs of down_proj stay as they are: no rotation can be
folded through the product with the gate.

Norms give their weights to what reads them, as in QuaRot; scales of channels (``balance:size=1``) may follow, and go
into the norms again. A block at the end that is no power of two gets a random orthogonal matrix. A model with LayerNorm
gets the reflection after it that keeps the mean (see :func:`~microscale.recipes.folding.keep_mean`).

Source: arXiv 2511.04214 (rotations of blocks for power-of-two scales); the folding is that of arXiv 2404.00456,
section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.algorithms.contract import RotationProblem, RotationStep
from microscale.algorithms.rotation import start_rotation
from microscale.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRotation(RotationStep):
    """A random rotation by ``seed`` of every ``size`` channels; ``values``: of the values of attention too."""

    name: ClassVar[str] = "blockrot"
    source: ClassVar[str] = "arXiv 2511.04214; 2404.00456 section 4"
    is_dispensable: ClassVar[bool] = True

    size: int = 32
    seed: int = 0
    values: bool = True

    def __post_init__(self) -> None:
        if self.size < 2 or self.size & (self.size - 1):
            raise RecipeError(f"blockrot: size is a power of two of at least 2, got {self.size}")

    def crosses(self, block_size: int) -> bool:
        """Whether its blocks are larger than those of the format."""
        return self.size > block_size

    def rotation(self, problem: RotationProblem) -> Float[Tensor, "size size"]:
        """Return the rotation of the residual stream, a matrix of blocks."""
        return self._blocks(problem.size, self.seed)

    def head_rotation(self, size: int, index: int) -> Float[Tensor, "size size"] | None:
        """Return the rotation of the values of block ``index``."""
        return self._blocks(size, self.seed + 1 + index) if self.values else None

    def _blocks(self, width: int, seed: int) -> Float[Tensor, "width width"]:
        whole, rest = divmod(width, self.size)
        sizes = [self.size] * whole + [rest] * (rest > 0)
        return torch.block_diag(*(start_rotation(size, seed) for size in sizes))
