"""OmniQuant: clips of the weights and a scale of each input channel, learned from the outputs of a decoder layer.

Learnable weight clipping is a sigmoid for each block of the format. Learnable equivalent transformation is x -> x / s,
W -> W s; where a norm comes before the group it takes the scale, else the scale stays online.

Left out: shifts of the inputs (formats here have no use for them: scales are symmetric), and the scales of queries and
keys, whose product is not quantized.

Source: arXiv 2308.13137, equations 2 to 4. The scale starts from the best of SmoothQuant's exponents or from 1, by the
error of the group's own outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microscale.algorithms.contract import BlockProblem, BlockStep, GroupProblem
from microscale.algorithms.fit import adam
from microscale.algorithms.learned import LearnedTransform, is_seen, learn_groups
from microscale.algorithms.objective import group_error
from microscale.algorithms.smoothquant import SmoothQuant
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError
from microscale.transforms import Transform, scale_transform


@dataclass(frozen=True, slots=True, kw_only=True)
class OmniQuant(BlockStep):
    """Scales at the rate ``lr`` and clips at ``lr_clip`` over ``epochs``; each can be left out."""

    name: ClassVar[str] = "omniquant"
    source: ClassVar[str] = "arXiv 2308.13137"

    epochs: int = 20
    lr: float = 5e-3
    lr_clip: float = 1e-2
    scale: bool = True
    clip: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 0 or not (self.scale or self.clip):
            raise RecipeError("omniquant: epochs is at least 0, and scale or clip must be learned")

    @property
    def wanted(self) -> Wanted | None:
        """Ranges and rows of the input, for the start."""
        return Wanted.SAMPLE if self.scale else Wanted.RANGE

    def learn(self, problem: BlockProblem) -> tuple[GroupProblem, ...]:
        """Return the groups with scales and clips.

        Raises:
            CalibrationError: the loss left the finite numbers.
        """
        learners = [_Scale(group, self) for group in problem.groups if is_seen(group)]
        scales = [learner.scale_log for learner in learners if self.scale]
        clips = [parameter for learner in learners for parameter in learner.clip_parameters]
        update = adam([(scales, self.lr), (clips, self.lr_clip)])
        steps = self.epochs * len(problem.targets)
        return learn_groups(problem, learners, [*scales, *clips], update, steps=steps, what=self.name)


def start_scale(group: GroupProblem) -> Tensor:
    """Return SmoothQuant's best scale, or ones where that is worse than no scale."""
    found = SmoothQuant(search=True).input_scale(group)
    ones = torch.ones_like(found)
    return found if group_error(group, found) < group_error(group, ones) else ones


class _Scale(LearnedTransform):
    def __init__(self, group: GroupProblem, options: OmniQuant) -> None:
        super().__init__(group)
        if options.clip:
            self.learn_clips()
        self.is_learned = options.scale
        start = start_scale(group).log() if options.scale else torch.zeros(group.cols, device=self.weights[0].device)
        self.scale_log = start.detach().requires_grad_(options.scale)

    def turn(self, inputs: Tensor) -> Tensor:
        """Return x / s."""
        return inputs * (-self.scale_log).exp() if self.is_learned else inputs

    def turn_weight(self, weight: Tensor) -> Tensor:
        """Return W s."""
        return weight * self.scale_log.exp() if self.is_learned else weight

    def transforms(self) -> tuple[Transform, ...]:
        """Return the scale as a transform."""
        return (scale_transform((-self.scale_log.detach()).exp()),) if self.is_learned else ()
