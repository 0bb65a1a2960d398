"""Macro-block scaling: a factor 1 + m/16 for each run of 128 input channels, beside block scales of powers of two.

A power of two can be up to a factor 2 from the best scale of a block. A common factor for a run of blocks moves all of
them to better places. Here a factor belongs to 128 channels, for all rows of the weights and all tokens: then x / s and
W s need no place in any format, and s goes into the norm before the layer, or stays online as a scale.

Left out: the paper's factors have one byte (1 + m/256) for each 1x128 macro-block of a tensor, each row and token with
its own, which no format here can store; of its two searches this is the one over 16 candidates.

Source: arXiv 2603.08713 (macro-block scaling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.algorithms.contract import FoldStep, GroupProblem
from microscale.algorithms.objective import group_error, rounded_inputs
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError
from microscale.kernels import fake_quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class MacroBlock(FoldStep):
    """x -> x / s, W -> W s with s = 1 + m / ``candidates`` for each run of ``size`` channels."""

    name: ClassVar[str] = "macroblock"
    source: ClassVar[str] = "arXiv 2603.08713"

    size: int = 128
    candidates: int = 16

    def __post_init__(self) -> None:
        if self.size < 1 or self.candidates < 1:
            raise RecipeError(f"macroblock: size and candidates are positive, got {self.size} and {self.candidates}")

    @property
    def wanted(self) -> Wanted | None:
        """Rows of the input."""
        return Wanted.SAMPLE

    def input_scale(self, group: GroupProblem) -> Float[Tensor, "cols"]:
        """Return s: of each run the candidate with the least error of its own part of the outputs, or 1 for all."""
        factors = [1.0 + m / self.candidates for m in range(self.candidates)]
        errors = torch.stack([self._errors(group, factor) for factor in factors])
        best = torch.tensor(factors, device=errors.device)[errors.argmin(0)]
        scale = best.repeat_interleave(self.size)[: group.cols]
        ones = torch.ones_like(scale)
        return scale if group_error(group, scale) < group_error(group, ones) else ones

    def _errors(self, group: GroupProblem, factor: float) -> Float[Tensor, "runs"]:
        """Return the squared error that each run of channels makes in the outputs of all layers."""
        sample = group.sample
        total = torch.zeros(-(-group.cols // self.size), dtype=torch.float64, device=sample.device)
        for layer in group.layers:
            target = layer.target
            inputs = rounded_inputs(sample / factor, layer.activations)
            weight = fake_quantize(target * factor, layer.format)
            for i, start in enumerate(range(0, group.cols, self.size)):
                run = slice(start, start + self.size)
                error = inputs[:, run] @ weight[:, run].T - sample[:, run] @ target[:, run].T
                total[i] += error.to(torch.float64).square().sum()
        return total
