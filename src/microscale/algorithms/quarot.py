"""QuaRot: a random Hadamard rotation of the residual stream of the whole model, folded into its weights.

Norms give their weights to what reads them, embeddings and output projections are multiplied by the rotation, readers
by its inverse; nothing is left to do at run time. ``values`` also rotates the values of attention, head by head, undone
in the output projection. The paper's online rotation before down_proj is a step ``hadamard`` that may follow (here in
blocks, not of the full width). It is kept for comparison: a rotation across blocks spreads each outlier over all of
them, and a block scale that is a power of two gets coarser everywhere (arXiv 2511.04214).

Left out: the rotation of queries and keys, which serves quantized caches.

Source: arXiv 2404.00456, section 4. A width that is no power of two takes a random orthogonal matrix, where the paper
has Hadamard matrices of some such sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from microscale.algorithms.contract import RotationProblem, RotationStep
from microscale.algorithms.rotation import start_rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class QuaRot(RotationStep):
    """A random rotation by ``seed``; ``values``: of the values too."""

    name: ClassVar[str] = "quarot"
    source: ClassVar[str] = "arXiv 2404.00456 section 4"

    seed: int = 0
    values: bool = True

    def rotation(self, problem: RotationProblem) -> Float[Tensor, "size size"]:
        """Return the rotation of the residual stream."""
        return start_rotation(problem.size, self.seed)

    def head_rotation(self, size: int, index: int) -> Float[Tensor, "size size"] | None:
        """Return the rotation of the values of block ``index``."""
        return start_rotation(size, self.seed + 1 + index) if self.values else None
