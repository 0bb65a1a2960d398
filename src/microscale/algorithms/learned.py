"""What the methods that learn from a decoder layer have in common: clips, groups that learn, and their error.

Source: arXiv 2308.13137 equation 2 (learned clips as a sigmoid).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.algorithms.block_error import block_error
from microscale.algorithms.contract import BlockProblem, GroupProblem, LayerFunction, LayerProblem
from microscale.algorithms.fit import Judged, Update, fit, step_batches
from microscale.algorithms.rtn import block_amax, block_width
from microscale.algorithms.straight_through import StandIn
from microscale.transforms import Transform

LOOKS = 5
OPEN = 4.0
"""Where the parameter of a learned clip starts: sigmoid(4) = 0.982."""


class LearnedClip:
    """One parameter for each block of a row; ``limit`` is sigmoid(parameter) * max |w| of the block."""

    def __init__(self, shape: Sequence[int], width: int, device: torch.device) -> None:
        self.width, self.cols = width, shape[1]
        self.parameter = torch.full((shape[0], -(-shape[1] // width)), OPEN, device=device, requires_grad=True)

    def limit(self, weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """Return the bound of each element."""
        share = torch.sigmoid(self.parameter).repeat_interleave(self.width, 1)[:, : self.cols]
        return share * block_amax(weight.detach(), self.width)


class Learner(Protocol):
    """Something of a group that is learned."""

    group: GroupProblem

    def stand_ins(self, biases: Mapping[str, Tensor | None]) -> Mapping[str, LayerFunction]:
        """Return what the layers compute while they learn."""
        ...

    def result(self) -> GroupProblem:
        """Return the group with what was learned."""
        ...


class LearnedTransform:
    """A group with a transform of its input, found by gradients.

    The transform comes after those that the group has already.
    """

    def __init__(self, group: GroupProblem) -> None:
        self.group = group
        self.weights = [layer.target for layer in group.layers]
        self.clips: list[LearnedClip | None] = [None] * len(self.weights)

    def learn_clips(self) -> None:
        """Learn a clip for each block of the weights, too."""
        self.clips = [_clip(layer, weight) for layer, weight in zip(self.group.layers, self.weights, strict=True)]

    @property
    def clip_parameters(self) -> list[Tensor]:
        """The parameters of the clips."""
        return [clip.parameter for clip in self.clips if clip is not None]

    def turn(self, inputs: Tensor) -> Tensor:
        """Return x M."""
        raise NotImplementedError

    def turn_weight(self, weight: Tensor) -> Tensor:
        """Return W M^-T."""
        raise NotImplementedError

    def transforms(self) -> tuple[Transform, ...]:
        """Return what was learned."""
        raise NotImplementedError

    def layers(self) -> tuple[LayerProblem, ...]:
        """Return the layers before the transform."""
        return self.group.layers

    def stand_ins(self, biases: Mapping[str, Tensor | None]) -> Mapping[str, LayerFunction]:
        """Return what the layers compute while they learn."""
        parts = zip(self.group.layers, self.weights, self.clips, strict=True)
        return {layer.name: self._stand_in(layer, weight, clip, biases[layer.name]) for layer, weight, clip in parts}

    def _stand_in(self, layer: LayerProblem, weight: Tensor, clip: LearnedClip | None, bias: Tensor | None) -> StandIn:
        def operands(inputs: Tensor) -> tuple[Tensor, Tensor]:
            return self.turn(inputs), self.turn_weight(weight)

        return StandIn(layer=layer, bias=bias, operands=operands, limit=None if clip is None else clip.limit)

    @torch.no_grad()
    def result(self) -> GroupProblem:
        """Return the group with the transforms and the clips."""
        chain = self.transforms()
        layers: list[LayerProblem] = []
        for layer, clip in zip(self.layers(), self.clips, strict=True):
            turned = layer.with_transforms(chain)
            limit = None if clip is None else clip.limit(turned.target)
            layers.append(dataclasses.replace(turned, clip=limit))
        return dataclasses.replace(self.group, layers=tuple(layers))


def _clip(layer: LayerProblem, weight: Tensor) -> LearnedClip | None:
    width = block_width(layer.format, weight.shape[1])
    return None if width is None else LearnedClip(weight.shape, width, weight.device)


def is_seen(group: GroupProblem) -> bool:
    """Whether any token reached the group."""
    return group.inputs is not None and group.inputs.num_tokens > 0


def all_stand_ins(learners: Sequence[Learner], biases: Mapping[str, Tensor | None]) -> dict[str, LayerFunction]:
    """Return what the layers of all groups compute while they learn."""
    return {name: function for learner in learners for name, function in learner.stand_ins(biases).items()}


def learn_groups(
    problem: BlockProblem,
    learners: Sequence[Learner],
    parameters: Sequence[Tensor],
    update: Update,
    *,
    steps: int,
    what: str,
) -> tuple[GroupProblem, ...]:
    """Run ``steps`` steps of gradient descent on the outputs of a decoder layer, one batch each; return its groups.

    Groups without a learner stay as they are. Gradients that pass through a rounding are noise in part, so the error
    with rounded weights is measured :data:`LOOKS` times from the start on and at the end; the best of these is what
    counts, be it the groups as they came.

    Raises:
        CalibrationError: the loss left the finite numbers.
    """
    start = Judged(state=problem.groups, error=block_error(problem, problem.groups))
    unit = max(start.error, 1e-30)
    stand_ins = all_stand_ins(learners, problem.biases)

    def loss_of(index: Tensor) -> Tensor:
        batch = int(index)
        return (problem.forward(stand_ins, batch) - problem.targets[batch]).square().mean() / unit

    def judge() -> Judged[tuple[GroupProblem, ...]]:
        results = {id(learner.group): learner.result() for learner in learners}
        learned = tuple(results.get(id(group), group) for group in problem.groups)
        return Judged(state=learned, error=block_error(problem, learned))

    return fit(
        step_batches(len(problem.targets), steps, seed=problem.seed),
        loss_of,
        update,
        parameters=parameters,
        start=start,
        judge=judge,
        num_looks=LOOKS,
        name=what,
        progress=lambda step, count: problem.progress(step, count, what),
    ).best.state
