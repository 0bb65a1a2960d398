"""What the methods that learn from a decoder layer have in common: clips with gradients, and one loop of training.

A clip is a share of the largest magnitude of a block; the scale of the block is taken from what it leaves. The gradient
passes the rounding as if it were not there, and the scale as if it were no power of two: with s proportional to the
clip c, dq/dc = (q - w) / c for a number inside of the clip and q / c for one past it.

Source: arXiv 2308.13137 equation 2 (learned clips as a sigmoid), arXiv 1902.08153 (gradient of a scale).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from microscale.algorithms.block_error import block_error
from microscale.algorithms.contract import BlockProblem, GroupTask, LayerFunction, LayerTask
from microscale.algorithms.rtn import block_amax, block_width
from microscale.algorithms.straight_through import straight_through, straight_through_inputs
from microscale.errors import CalibrationError
from microscale.formats import Format
from microscale.kernels import fake_quantize
from microscale.kernels.transform import apply_transforms
from microscale.transforms import Transform

LOOKS = 5
OPEN = 4.0
"""Where the parameter of a learned clip starts: sigmoid(4) = 0.982."""


class _ClippedRounding(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, weight: Tensor, limit: Tensor, fmt: Format
    ) -> Tensor:
        rounded = fake_quantize(torch.clamp(weight.detach(), -limit, limit), fmt)
        ctx.save_for_backward(weight, limit, rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, limit, rounded = ctx.saved_tensors
        is_inside = weight.abs() <= limit
        by_limit = clip_gradient(gradients[0], weight, limit, rounded)
        return torch.where(is_inside, gradients[0], 0.0), by_limit, None


def clip_gradient(gradient: Tensor, weight: Tensor, limit: Tensor, rounded: Tensor) -> Tensor:
    """Return the gradient by the clip of every element."""
    change = torch.where(weight.abs() <= limit, rounded - weight, rounded)
    return gradient * change / limit.clamp(min=torch.finfo(torch.float32).tiny)


def clipped_rounding(
    weight: Float[Tensor, "rows cols"], limit: Float[Tensor, "rows cols"], fmt: Format
) -> Float[Tensor, "rows cols"]:
    """Return quantize(clamp(w, limit)) with the gradients by both."""
    return _ClippedRounding.apply(weight, limit, fmt)


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

    group: GroupTask

    def stand_ins(self, problem: BlockProblem) -> dict[str, LayerFunction]:
        """Return what the layers compute while they learn."""
        ...

    def result(self) -> GroupTask:
        """Return the group with what was learned."""
        ...


class LearnedTransform:
    """A group with a transform of its input, found by gradients, and a clip for each block of its weights.

    The transform comes after those that the group has already.
    """

    def __init__(self, group: GroupTask, *, has_clip: bool) -> None:
        self.group = group
        self.weights = [layer.target for layer in group.layers]
        self.clips = [_clip(layer, weight) if has_clip else None for layer, weight in self._pairs]

    @property
    def _pairs(self) -> list[tuple[LayerTask, Tensor]]:
        return list(zip(self.group.layers, self.weights, strict=True))

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

    def stand_ins(self, problem: BlockProblem) -> dict[str, LayerFunction]:
        """Return what the layers compute while they learn."""
        return {
            layer.name: self._stand_in(layer, weight, clip, problem.biases[layer.name])
            for (layer, weight), clip in zip(self._pairs, self.clips, strict=True)
        }

    def _stand_in(
        self, layer: LayerTask, weight: Tensor, clip: LearnedClip | None, bias: Tensor | None
    ) -> LayerFunction:
        def run(inputs: Tensor) -> Tensor:
            turned = self.turn(apply_transforms(inputs, layer.transforms))
            matrix = self.turn_weight(weight)
            if clip is None:
                rounded = straight_through(matrix, layer.format)
            else:
                rounded = clipped_rounding(matrix, clip.limit(matrix), layer.format)
            return functional.linear(straight_through_inputs(turned, layer.activations), rounded, bias)

        return run

    @torch.no_grad()
    def result(self) -> GroupTask:
        """Return the group with the transforms and the clips."""
        chain = self.transforms()
        layers: list[LayerTask] = []
        for layer, clip in zip(self.group.layers, self.clips, strict=True):
            turned = layer.with_transforms(chain)
            limit = None if clip is None else clip.limit(turned.target)
            layers.append(dataclasses.replace(turned, clip=limit))
        return dataclasses.replace(self.group, layers=tuple(layers))


def _clip(layer: LayerTask, weight: Tensor) -> LearnedClip | None:
    width = block_width(layer.format, weight.shape[1])
    return None if width is None else LearnedClip(weight.shape, width, weight.device)


def is_seen(group: GroupTask) -> bool:
    """Whether any token reached the group."""
    return group.inputs is not None and group.inputs.num_tokens > 0


def learn_groups(
    problem: BlockProblem,
    learners: Sequence[Learner],
    parameters: Sequence[Tensor],
    update: Callable[[float], None],
    *,
    steps: int,
    what: str,
) -> tuple[GroupTask, ...]:
    """Run ``steps`` steps of gradient descent on the outputs of a decoder layer, one batch each; return its groups.

    ``update`` gets the share of the steps that is done and changes the parameters by their gradients. Groups without a
    learner stay as they are. Gradients that pass through a rounding are noise in part, so the error with rounded
    weights is measured :data:`LOOKS` times from the start on and at the end; the best of these is what counts, be it
    the groups as they came.

    Raises:
        CalibrationError: the loss left the finite numbers.
    """
    best, unit = problem.groups, block_error(problem, problem.groups)
    least = unit
    looks = {i * steps // LOOKS for i in range(LOOKS)} if steps else set[int]()
    stand_ins = {name: function for learner in learners for name, function in learner.stand_ins(problem).items()}
    for i, batch in enumerate(_batches(len(problem.targets), steps, problem.seed)):
        problem.progress(i, steps, what)
        if i in looks:
            best, least = _better(problem, learners, best, least)
        outputs = problem.forward(stand_ins, batch)
        loss = (outputs - problem.targets[batch]).square().mean() / max(unit, 1e-30)
        if not bool(torch.isfinite(loss)):
            raise CalibrationError(f"{what}: the loss became {loss.item()} at step {i}; a smaller lr may help")
        if loss.requires_grad:
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
            update(i / steps)
        for parameter in parameters:
            parameter.grad = None
    return _better(problem, learners, best, least)[0]


def _better(
    problem: BlockProblem, learners: Sequence[Learner], best: tuple[GroupTask, ...], least: float
) -> tuple[tuple[GroupTask, ...], float]:
    """Return the better of the best so far and what the learners have now, with its error."""
    results = {id(learner.group): learner.result() for learner in learners}
    learned = tuple(results.get(id(group), group) for group in problem.groups)
    error = block_error(problem, learned)
    return (learned, error) if error <= least else (best, least)


def _batches(count: int, steps: int, seed: int) -> Iterator[int]:
    """Yield the numbers of batches, each as often as the others."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    for _ in range(steps):
        left = left or torch.randperm(count, generator=generator).tolist()
        yield left.pop()


def adam(parts: Sequence[tuple[Sequence[Tensor], float]]) -> Callable[[float], None]:
    """Return an update by AdamW without decay, for parameters with their rates, along half a cosine down to 0."""
    groups: list[dict[str, Any]] = [{"params": list(tensors), "lr": rate} for tensors, rate in parts if tensors]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [float(group["lr"]) for group in groups]

    def update(done: float) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]

    return update
