"""Low-rank compensation: a side path in full precision for the largest part of what rounding took.

With W' - Q(W') = E and the second moment S of the inputs, E S^(1/2) = U D V^T; the path keeps the first ``rank``
singular values: up = U D, down = V^T S^(-1/2).

Source: arXiv 2402.02446 (LQER), arXiv 2410.06040 (QERA, the exact weighting by S^(1/2)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microscale.algorithms.contract import LayerProblem, SideStep
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError
from microscale.kernels import dequantize
from microscale.tensor import QuantizedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankStep(SideStep):
    """A side path of ``rank``, weighted by the inputs."""

    name: ClassVar[str] = "lowrank"
    source: ClassVar[str] = "arXiv 2410.06040"

    rank: int = 16

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"lowrank: rank is at least 1, got {self.rank}")

    @property
    def wanted(self) -> Wanted | None:
        """The second moment of the inputs."""
        return Wanted.SECOND_MOMENT

    def side(self, layer: LayerProblem, tensor: QuantizedTensor) -> tuple[Tensor, Tensor]:
        """Return (down, up); a layer that no token reached is weighted evenly."""
        error = (layer.target - dequantize(tensor, torch.float32)).to(torch.float64)
        moment = layer.second_moment
        cols = error.shape[1]
        root = torch.eye(cols, dtype=torch.float64, device=error.device)
        inverse = root
        if moment is not None:
            wide = moment.to(torch.float64)
            wide = wide + torch.eye(cols, dtype=wide.dtype, device=wide.device) * float(wide.diagonal().mean()) * 1e-4
            values, vectors = torch.linalg.eigh(wide)
            values = values.clamp(min=float(values[-1].clamp(min=1e-30)) * 1e-10)
            root = vectors * values.sqrt() @ vectors.T
            inverse = vectors / values.sqrt() @ vectors.T
        left, singular, right = torch.linalg.svd(error @ root, full_matrices=False)
        rank = min(self.rank, singular.numel())
        up = left[:, :rank] * singular[:rank]
        down = right[:rank] @ inverse
        return down.to(torch.float32), up.to(torch.float32)
