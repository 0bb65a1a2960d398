"""What a quantized layer does to its input at run time besides rounding: transforms, and a low-rank side path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from microscale.kernels.transform import apply_transforms
from microscale.nn.modules import KeptDtypes
from microscale.transforms import Transform, TransformSpec


class InputTransforms(KeptDtypes):
    """A chain of transforms; buffer ``<i>_<part>`` holds a part of the i-th."""

    def __init__(self, specs: Sequence[TransformSpec], cols: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.specs = tuple(specs)
        self.cols = cols
        for i, spec in enumerate(self.specs):
            for name, (shape, dtype) in spec.part_specs(cols).items():
                self.register_buffer(f"{i}_{name}", torch.empty(shape, dtype=dtype, device=device))

    @classmethod
    def from_transforms(cls, transforms: Sequence[Transform]) -> InputTransforms:
        """Build the module around a copy of transforms: layers of a group have the same, but share no tensor."""
        module = cls([transform.spec for transform in transforms], transforms[0].cols, device="meta")
        for i, transform in enumerate(transforms):
            for name, part in transform.parts.items():
                module.register_buffer(f"{i}_{name}", part.detach().clone())
        return module

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """The chain with its numbers."""
        chain: list[Transform] = []
        for i, spec in enumerate(self.specs):
            parts = {name: self.get_buffer(f"{i}_{name}") for name in spec.part_specs(self.cols)}
            chain.append(Transform(spec=spec, cols=self.cols, parts=parts))
        return tuple(chain)

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def forward(self, inputs: Float[Tensor, "... cols"]) -> Float[Tensor, "... cols"]:
        """Return the transformed inputs in their own dtype."""
        return apply_transforms(inputs, self.transforms)

    def extra_repr(self) -> str:
        return " then ".join(str(spec) for spec in self.specs)


class LowRank(KeptDtypes):
    """x -> (x down^T) up^T: what quantization took from the weight, as far as a matrix of a low rank gives it back."""

    down: Tensor
    up: Tensor

    def __init__(self, rank: int, cols: int, rows: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("down", torch.empty(rank, cols, dtype=torch.float32, device=device))
        self.register_buffer("up", torch.empty(rows, rank, dtype=torch.float32, device=device))

    @classmethod
    def from_factors(cls, down: Float[Tensor, "rank cols"], up: Float[Tensor, "rows rank"]) -> LowRank:
        """Build the module around its factors."""
        module = cls(down.shape[0], down.shape[1], up.shape[0], device="meta")
        module.down, module.up = down.detach().to(torch.float32), up.detach().to(torch.float32)
        return module

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.down.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of both factors."""
        return 4 * (self.down.numel() + self.up.numel())

    def forward(self, inputs: Float[Tensor, "... cols"]) -> Float[Tensor, "... rows"]:
        """Return the side path's output in the dtype of the inputs."""
        down, up = self.down.to(inputs.dtype), self.up.to(inputs.dtype)
        return functional.linear(functional.linear(inputs, down), up)
