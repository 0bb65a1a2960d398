"""AutoRound: an offset for each number before it is rounded, and a clip for each block, by the signs of gradients.

q = round(w + V gap), where gap is the distance between the two numbers of the format around w and V lies in -0.5 to
0.5: it decides whether w goes up or down. The scale is that of the block with its largest magnitude times alpha.
Both move by the sign of their gradient, by a step that falls from ``lr`` to 0 in a straight line.

The paper keeps the V of the best step, by the loss of that step's batch; here the best of a few is kept, by the error
on several batches, plain rounding among them. Left out: its alpha and beta for the two ends of an asymmetric range are
one factor here.

Source: arXiv 2309.05516, algorithm 1 and equation 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microscale.algorithms.contract import BlockProblem, BlockStep, GroupProblem, LayerFunction, LayerProblem, clipped
from microscale.algorithms.fit import line
from microscale.algorithms.learned import is_seen, learn_groups
from microscale.algorithms.rtn import block_amax, block_width
from microscale.algorithms.straight_through import StandIn
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError
from microscale.formats import ActivationSpec, Format
from microscale.kernels.grid import grid_refusal, make_grid

SMALLEST_CLIP = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRound(BlockStep):
    """``steps`` steps of signed gradient descent, one batch of windows each; ``lr`` 0 stands for 1 / steps."""

    name: ClassVar[str] = "autoround"
    source: ClassVar[str] = "arXiv 2309.05516 algorithm 1"
    next_step: ClassVar[str | None] = "rtn"  # it tunes rounding to nearest alone

    steps: int = 200
    lr: float = 0.0
    clip: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0 or self.lr < 0:
            raise RecipeError(f"autoround: steps and lr are at least 0, got {self.steps} and {self.lr}")

    @property
    def is_online(self) -> bool:
        """What it learns goes into the rounding."""
        return False

    @property
    def segment_obstacle(self) -> str | None:
        """Segments have grids of their own, which is all it needs."""
        return None

    @property
    def wanted(self) -> Wanted | None:
        """How many tokens came by."""
        return Wanted.RANGE

    def refusal(self, fmt: Format, activations: ActivationSpec | None) -> str | None:
        """Refuse formats whose grid is not fixed by scales."""
        return grid_refusal(fmt)

    def learn(self, problem: BlockProblem) -> tuple[GroupProblem, ...]:
        """Return the groups with an offset for every weight and a clip.

        Raises:
            CalibrationError: the loss left the finite numbers.
        """
        learners = [_TunedGroup(group, self.clip) for group in problem.groups if is_seen(group)]
        layers = [layer for learner in learners for layer in learner.layers]
        rate = self.lr or 1.0 / max(self.steps, 1)

        @torch.no_grad()
        def update(step: int, steps: int) -> None:
            for layer in layers:
                layer.move(rate * line(step, steps))

        parameters = [parameter for layer in layers for parameter in layer.parameters]
        return learn_groups(problem, learners, parameters, update, steps=self.steps, what=self.name)


class _TunedLayer:
    """The offsets of a weight, in gaps, and a factor for each block."""

    def __init__(self, layer: LayerProblem, *, has_clip: bool) -> None:
        self.layer = layer
        self.weight = layer.target
        self.source = clipped(self.weight, layer)
        self.offset = torch.zeros_like(self.weight, requires_grad=True)
        self.width = block_width(layer.format, self.weight.shape[1])
        count = -(-self.weight.shape[1] // (self.width or self.weight.shape[1]))
        self.factor = torch.ones(self.weight.shape[0], count, device=self.weight.device)
        if has_clip and self.width is not None:
            self.factor.requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        """What moves."""
        return [tensor for tensor in (self.offset, self.factor) if tensor.requires_grad]

    @property
    def limit(self) -> Tensor:
        """The bound of each element."""
        cols = self.weight.shape[1]
        if self.width is None:
            return self.source.abs().amax().expand_as(self.weight)
        return self.factor.repeat_interleave(self.width, 1)[:, :cols] * block_amax(self.source, self.width)

    def move(self, step: float) -> None:
        """Take a step against the signs of the gradients."""
        if self.offset.grad is not None:
            self.offset.sub_(step * self.offset.grad.sign()).clamp_(-0.5, 0.5)
        if self.factor.grad is not None:
            self.factor.sub_(step * self.factor.grad.sign()).clamp_(SMALLEST_CLIP, 1.0)

    def stand_in(self, bias: Tensor | None) -> StandIn:
        """Return what the layer computes while it learns."""
        return StandIn(
            layer=self.layer,
            bias=bias,
            operands=lambda inputs: (inputs, self.weight),
            limit=lambda weight: self.limit,
            offset=self.offset,
        )

    @torch.no_grad()
    def result(self) -> LayerProblem:
        """Return the layer with its offsets in units of the weight."""
        limit = self.limit
        grid = make_grid(torch.clamp(self.weight, -limit, limit), self.layer.format)
        offset = self.offset.detach() * grid.gap(self.weight)
        return dataclasses.replace(self.layer, clip=limit.clone(), offset=offset)


class _TunedGroup:
    def __init__(self, group: GroupProblem, has_clip: bool) -> None:
        self.group = group
        self.layers = [_TunedLayer(layer, has_clip=has_clip) for layer in group.layers]

    def stand_ins(self, biases: Mapping[str, Tensor | None]) -> Mapping[str, LayerFunction]:
        """Return what the layers compute while they learn."""
        return {layer.layer.name: layer.stand_in(biases[layer.layer.name]) for layer in self.layers}

    def result(self) -> GroupProblem:
        """Return the group with the offsets."""
        return dataclasses.replace(self.group, layers=tuple(layer.result() for layer in self.layers))
