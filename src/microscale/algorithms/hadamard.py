"""Block-diagonal Hadamard rotation, aligned with the blocks of the format: online on inputs, folded into weights.

It spreads an outlier over its own block only, so that no other block's scale grows, which is what makes it help where a
global rotation hurts a power-of-two block scale. Random signs before the rotation make it differ from layer to layer.

Source: arXiv 2511.04214 (block rotation is all you need for MXFP4), arXiv 2509.23202 (MR-GPTQ).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from microscale.algorithms.contract import GroupProblem, TransformStep
from microscale.errors import RecipeError
from microscale.transforms import Transform, hadamard_transform, scale_transform

LARGEST_BLOCK = 128


ROLES = ("all", "qkv", "out", "gate_up", "up", "down")
"""What ``roles`` may end in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hadamard(TransformStep):
    """x' = x H by blocks of ``size`` columns (16 to 128); ``signs`` flips random columns first, by ``seed``.

    ``roles`` chooses groups by the end of their role (``down``: before down_proj alone). A width that ``size`` does not
    divide takes the largest power of two that does; an odd width is left as it is.
    """

    name: ClassVar[str] = "hadamard"
    source: ClassVar[str] = "arXiv 2511.04214"

    size: int = 32
    signs: bool = False
    seed: int = 0
    roles: str = "all"

    def __post_init__(self) -> None:
        if self.roles.rpartition(".")[2] not in ROLES:
            raise RecipeError(f"hadamard: roles is one of {', '.join(ROLES)}, got {self.roles!r}")
        if self.size not in (2, 4, 8, 16, 32, 64, 128):
            raise RecipeError(f"hadamard: size is a power of two from 2 to {LARGEST_BLOCK}, got {self.size}")

    def transforms(self, group: GroupProblem) -> tuple[Transform, ...]:
        """Return the rotation, and the signs before it."""
        size = fitting_size(group.cols, self.size)
        if size < 2 or (self.roles != "all" and not group.role.endswith(self.roles)):
            return ()
        rotation = hadamard_transform(group.cols, size)
        if not self.signs:
            return (rotation,)
        own = zlib.crc32(group.layers[0].name.encode())  # the same group gets the same signs in every run
        generator = torch.Generator().manual_seed(self.seed + own)
        signs = torch.randint(0, 2, (group.cols,), generator=generator) * 2 - 1
        return (scale_transform(signs.to(group.layers[0].weight.device)), rotation)


def fitting_size(cols: int, wanted: int) -> int:
    """Return the largest power of two up to ``wanted`` that divides the width."""
    return min(wanted, cols & -cols)
