"""Balance: scale each input channel so that inputs and weights are equally large there, behind a rotation of blocks.

The error of a rounded block goes with the energy of the block, and a rotation spreads it evenly over its channels. So
the error that rounded inputs make goes with sum(x_j^2) * sum(w_j^2) over the channels j of a block, and so does that of
rounded weights. Dividing x by s and multiplying w by s leaves the product alone and makes both smallest at
s_j = (rms x_j / rms w_j)^(1/2), by the inequality of Cauchy and Schwarz.

A few tokens (mostly the first of a window) can be a thousand times larger than the others. They would alone decide
every mean over tokens, so a token whose energy is above :data:`CAP` times the median counts for as much as that.

Source: the rule of s is that of arXiv 2211.10438, equation 4, with means in the place of maxima; the rest is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.algorithms.contract import FoldStep, GroupProblem
from microscale.algorithms.hadamard import fitting_size
from microscale.algorithms.objective import rounded_inputs
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError
from microscale.kernels import fake_quantize
from microscale.kernels.transform import block_product, hadamard_matrix

CAP = 8.0
"""How many times the median energy a token counts for at most."""
POWERS = (0.25, 0.5, 0.75)
"""The exponents of the inputs that are tried; the weights have what is left to 1."""
LARGEST_SCALE = 1e3
"""The bound of a scale and of its inverse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance(FoldStep):
    """x -> x / s, W -> W s with the best of a few balances, where that lowers the error of a group's outputs.

    ``size`` is that of the block Hadamard rotation that will follow (1: none follows).
    """

    name: ClassVar[str] = "balance"
    source: ClassVar[str] = "arXiv 2211.10438 equation 4, with means"

    size: int = 32

    def __post_init__(self) -> None:
        if self.size < 1 or self.size & (self.size - 1):
            raise RecipeError(f"balance: size is a power of two, got {self.size}")

    @property
    def wanted(self) -> Wanted | None:
        """Rows of the input."""
        return Wanted.SAMPLE

    @property
    def segment_obstacle(self) -> str | None:
        """The rotation that it scales for mixes channels."""
        return None if self.size == 1 else "it scales channels for a rotation, which cannot follow (size=1 needs none)"

    def input_scale(self, group: GroupProblem) -> Float[Tensor, "cols"]:
        """Return s; a channel without input or without weights keeps 1."""
        share = token_shares(group.sample)
        inputs = (group.sample * share).square().mean(0).sqrt()
        weights = torch.stack([layer.target.square().mean(0) for layer in group.layers]).mean(0).sqrt()
        best = torch.ones_like(inputs)
        least = self._error(group, best, share)
        for power in POWERS:
            scale = group.share(balancing_scale(inputs, weights, power))
            error = self._error(group, scale, share)
            if error < least:
                best, least = scale, error
        return best

    def _error(self, group: GroupProblem, scale: Tensor, share: Tensor) -> float:
        """Return the squared error of all outputs with both sides scaled, rotated and rounded."""
        sample = group.sample
        total = torch.zeros((), dtype=torch.float64, device=sample.device)
        for layer in group.layers:
            target = layer.target
            inputs = rounded_inputs(self._rotated(sample / scale), layer.activations)
            weight = fake_quantize(self._rotated(target * scale), layer.format)
            total += ((inputs @ weight.T - sample @ target.T) * share).to(torch.float64).square().sum()
        return float(total) if bool(torch.isfinite(total)) else float("inf")

    def _rotated(self, values: Tensor) -> Tensor:
        size = fitting_size(values.shape[1], self.size)
        return block_product(values, hadamard_matrix(size, values).unsqueeze(0)) if size > 1 else values


def token_shares(inputs: Float[Tensor, "tokens cols"]) -> Float[Tensor, "tokens 1"]:
    """Return the factor of each token that brings its energy down to :data:`CAP` times the median; 1 for most."""
    energy = inputs.square().sum(-1, keepdim=True)
    tiny = torch.finfo(energy.dtype).tiny
    return (CAP * energy.median() / energy.clamp(min=tiny)).clamp(max=1.0).sqrt()


def balancing_scale(
    inputs: Float[Tensor, "cols"], weights: Float[Tensor, "cols"], power: float
) -> Float[Tensor, "cols"]:
    """Return inputs^power / weights^(1 - power), 1 where either is 0.

    All are divided by the power of two that is nearest to their geometric mean.
    """
    is_usable = (inputs > 0) & (weights > 0)
    scale = torch.where(is_usable, inputs, 1.0).pow(power) / torch.where(is_usable, weights, 1.0).pow(1 - power)
    is_usable &= torch.isfinite(scale)
    if not bool(is_usable.any()):
        return torch.ones_like(scale)
    scale = scale / scale[is_usable].log2().mean().round().exp2()
    return torch.where(is_usable, scale, 1.0).clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
