"""Refine: from the rounded model on, the weights learn end to end to keep the model's own predictions.

The transforms and scales that earlier steps found stay. The weights start from those before the rounding, for a weight
in the middle between two numbers turns by a small move, one that error feedback has put onto a number does not. They
learn by the KL divergence of the predictions from those of the unquantized model, straight through the rounding of
weights and inputs, and are rounded to nearest at the end. That model and the one that came are then compared on windows
that this step has not learned from, and the better one is kept. (Earlier steps may have seen these windows: what takes
the place of their result has to be better in spite of that.)

A learning rate is in units of each layer's own rounding: sqrt(12) times its root mean square error, which is the
distance of its numbers where these lie evenly. Models have weights of very different size; a rate of 2e-4 is a
hundredth of that distance in one and a five-hundredth in another, where it learns too little to make up for the start.

Source: arXiv 2601.20088 (quantization-aware distillation: KL to the teacher alone); start, rates and choice are ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microscale.algorithms.block_error import rounded_stand_ins
from microscale.algorithms.contract import GroupProblem, LayerFunction, LayerProblem, ModelProblem, RefineStep
from microscale.algorithms.distill import ENOUGH_TOKENS, held_out_divergence, mean_divergence
from microscale.algorithms.fit import Judged, adam, epoch_batches, fit, hold_out, warm_cosine
from microscale.algorithms.straight_through import StandIn
from microscale.errors import RecipeError, counted
from microscale.kernels import fake_quantize
from microscale.kernels.transform import restore_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Refine(RefineStep):
    """Learn weights over ``epochs`` of the calibration windows, ``batch`` of which make one step.

    ``rate`` is in units of each layer's rounding, for 32,768 tokens of calibration and more; of fewer every step takes
    proportionally less.
    """

    name: ClassVar[str] = "refine"
    source: ClassVar[str] = "arXiv 2601.20088"

    epochs: float = 4.0
    batch: int = 4
    rate: float = 0.006

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch < 1 or self.rate < 0:
            raise RecipeError(
                f"refine: epochs >= 0, batch >= 1 and rate >= 0, got {self.epochs}, {self.batch} and {self.rate}"
            )

    def windows_learned(self, count: int) -> float:
        """All that are not held out, once in each epoch."""
        return self.epochs * len(hold_out(count, 0)[0])

    def refine(self, problem: ModelProblem, rounded: Mapping[str, LayerFunction]) -> tuple[GroupProblem, ...] | None:
        """Return the groups with learned weights, or None where those of ``rounded`` are better on held-out windows.

        Raises:
            CalibrationError: the loss left the finite numbers.
        """
        learned, held_out = (problem.windows[samples] for samples in hold_out(len(problem.windows), problem.seed))
        if not len(held_out):
            problem.tell("refine left the model as it was: it needs two windows at least, one to check itself on")
            return None
        layers = [_LearnedLayer(layer) for group in problem.groups for layer in group.layers]
        stand_ins = dict(rounded) | {one.layer.name: one.stand_in(problem.biases) for one in layers}
        share = self.rate * min(1.0, problem.windows.token_ids.numel() / ENOUGH_TOKENS)

        def results() -> tuple[GroupProblem, ...]:
            found = iter([one.result() for one in layers])
            return tuple(
                dataclasses.replace(group, layers=tuple(next(found) for _ in group.layers)) for group in problem.groups
            )

        def judge() -> Judged[tuple[GroupProblem, ...] | None]:
            state = results()
            functions = dict(rounded) | rounded_stand_ins(state, problem.biases)
            return Judged(state=state, error=held_out_divergence(problem, functions, held_out))

        def loss_of(batch: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
            *first, last = learned[batch].split(1)
            for window in first:  # one after the other: the logits of many are more than memory holds
                (mean_divergence(problem, stand_ins, window) / len(batch)).backward()
            return mean_divergence(problem, stand_ins, last) / len(batch)

        with torch.no_grad():
            before = held_out_divergence(problem, rounded, held_out)
        start: Judged[tuple[GroupProblem, ...] | None] = Judged(state=None, error=before)
        found = fit(
            epoch_batches(len(learned), self.epochs, batch=self.batch, seed=problem.seed),
            loss_of,
            adam(
                [([one.weight], share * one.unit) for one in layers],
                schedule=warm_cosine,
                betas=(0.9, 0.95),
                max_norm=1.0,
            ),
            parameters=[one.weight for one in layers],
            start=start,
            judge=judge,
            name=self.name,
            remedy="lower rate",
            progress=lambda step, steps: problem.progress(step, steps, "refining"),
        )
        outcome = "is kept" if found.best.state is None else "is left for what was learned"
        problem.tell(
            f"refine: the rounded model {outcome}; KL on {counted(len(held_out), 'held-out window')}"
            f" {before:.3g} before,"
            f" {found.last.error:.3g} after"
        )
        return found.best.state


class _LearnedLayer:
    """The weight of x' as a parameter, and what rounding it costs at the start."""

    def __init__(self, layer: LayerProblem) -> None:
        self.layer = dataclasses.replace(layer, clip=None, offset=None, inputs=None)
        target = self.layer.target
        error = (fake_quantize(target, layer.format) - target).square().mean()
        self.unit = math.sqrt(12.0 * float(error))
        self.weight = target.clone().requires_grad_()

    def stand_in(self, biases: Mapping[str, Tensor | None]) -> StandIn:
        """Return what the layer computes while it learns."""
        return StandIn(layer=self.layer, bias=biases[self.layer.name], operands=lambda inputs: (inputs, self.weight))

    def result(self) -> LayerProblem:
        """Return the layer with the weight that was learned."""
        weight = restore_weight(self.weight.detach(), self.layer.transforms)
        return dataclasses.replace(self.layer, weight=weight)
