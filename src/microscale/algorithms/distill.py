"""End-to-end distillation: weights and block transforms learn together to keep the model's own predictions.

The quantized model runs with rounded weights and inputs; the KL divergence of its predictions from those of the
unquantized model is what AdamW brings down, straight through the rounding. No label is used, so that the model is bent
back to itself and not to the calibration text. Inputs are rotated by a block Hadamard matrix on the way
(``transform``); on request every group of layers learns the matrices instead, from a Hadamard start: one for each
block, or one for all blocks of a group (``shared``, a few kilobytes in all).

Source: arXiv 2601.20088 (quantization-aware distillation: KL to the teacher alone); arXiv 2603.16590 (block-affine
transforms aligned with MX blocks); their combination, the start and the schedule are ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from microscale.algorithms.contract import GroupTask, LayerFunction, LayerTask, ModelProblem, ModelStep
from microscale.algorithms.hadamard import fitting_size
from microscale.algorithms.straight_through import straight_through, straight_through_inputs
from microscale.errors import CalibrationError, RecipeError
from microscale.kernels.transform import apply_transforms, block_product, hadamard_matrix, restore_weight
from microscale.transforms import block_transform, hadamard_transform

TRANSFORMS = ("block", "shared", "hadamard", "none")
WARM_UP = 0.05
"""Share of the steps over which the learning rates rise."""
FLOOR = 0.05
"""Share of the learning rates that the cosine ends at."""
ENOUGH_TOKENS = 32_768
"""Tokens of calibration from which on the learning rates are taken as they are; fewer take less in proportion."""
MOST_HELD_OUT, HELD_OUT_SHARE = 4, 8
"""Windows that nothing learns from: one in eight, and at most four."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill(ModelStep):
    """Learn weights (``lr``) and block transforms (``lr_transform``) over ``epochs`` of the calibration windows.

    ``transform``: ``hadamard`` (fixed), ``block`` (a learned matrix for each block), ``shared`` (one for all blocks of
    a group) or ``none``. ``batch`` windows make one step. Rates are those for 32,768 tokens and more; of fewer every
    step takes proportionally less. One window in eight (four at most, none of a single one) is held out: where learning
    made the predictions on these worse, the weights stay as they were.
    """

    name: ClassVar[str] = "distill"
    source: ClassVar[str] = "arXiv 2601.20088, arXiv 2603.16590"

    epochs: float = 2.0
    batch: int = 1
    lr: float = 2e-4
    lr_transform: float = 1e-3
    transform: str = "hadamard"
    size: int = 32

    def __post_init__(self) -> None:
        if self.transform not in TRANSFORMS:
            raise RecipeError(f"distill: transform is one of {', '.join(TRANSFORMS)}, got {self.transform!r}")
        if self.epochs < 0 or self.batch < 1:
            raise RecipeError(f"distill: epochs >= 0 and batch >= 1, got {self.epochs} and {self.batch}")

    @property
    def is_online(self) -> bool:
        """Any transform stays online."""
        return self.transform != "none"

    @property
    def segment_obstacle(self) -> str | None:
        """Its weights learn the rounding of any format, but its transforms mix channels."""
        if self.transform == "none":
            return None
        return f"its transform={self.transform} mixes channels, so that their order is lost"

    def learn(self, problem: ModelProblem) -> tuple[GroupTask, ...]:
        """Return the groups with the learned weights and transforms.

        Raises:
            CalibrationError: the loss left the finite numbers.
        """
        groups = [_LearnedGroup(group, self) for group in problem.groups]
        stand_ins = {name: function for group in groups for name, function in group.stand_ins(problem).items()}
        optimizer = torch.optim.AdamW(
            [
                {"params": [weight for group in groups for weight in group.weights], "lr": self.lr},
                {"params": [group.matrix for group in groups if group.is_learned], "lr": self.lr_transform},
            ],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        share = min(1.0, problem.windows.numel() / ENOUGH_TOKENS)
        rates = [share * float(part["lr"]) for part in optimizer.param_groups]
        parameters = [weight for part in optimizer.param_groups for weight in part["params"]]
        learned, held_out = self._split(problem)
        batches = list(self._batches(learned, problem.seed))
        before = held_out_divergence(problem, stand_ins, held_out) if batches else 0.0
        for i, tokens in enumerate(batches):
            problem.progress(i, len(batches), "distilling")
            for part, rate in zip(optimizer.param_groups, rates, strict=True):
                part["lr"] = rate * schedule(i, len(batches))
            loss = divergence(problem, stand_ins, tokens)
            if not bool(torch.isfinite(loss)):
                raise CalibrationError(f"distill: the loss became {float(loss)} at step {i}; lower lr or lr_transform")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        after = held_out_divergence(problem, stand_ins, held_out) if batches else 0.0
        if not after <= before:  # NaN is no better
            problem.tell(
                f"distill learned nothing that lasts: KL on {len(held_out)} held-out window(s) went from {before:.3g}"
                f" to {after:.3g}, so the weights stay as they were; give more calibration text, or a lower lr"
            )
            groups = [_LearnedGroup(group, self) for group in problem.groups]
        return tuple(group.result() for group in groups)

    def _split(self, problem: ModelProblem) -> tuple[Tensor, Tensor]:
        """Return the windows that are learned from, and those that are held out."""
        count = len(problem.windows)
        held_out = min(MOST_HELD_OUT, max(1, count // HELD_OUT_SHARE)) if count > 1 else 0
        order = torch.randperm(count, generator=torch.Generator().manual_seed(problem.seed))
        return problem.windows[order[held_out:].sort().values], problem.windows[order[:held_out].sort().values]

    def _batches(self, windows: Tensor, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        left = round(self.epochs * len(windows))
        while left > 0:
            order = torch.randperm(len(windows), generator=generator)[:left]
            for start in range(0, len(order), self.batch):
                yield windows[order[start : start + self.batch]]
            left -= len(order)


def schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: a short rise, then half a cosine down to :data:`FLOOR`."""
    rise = min(1.0, (step + 1) / (WARM_UP * steps + 1))
    return rise * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def divergence(problem: ModelProblem, stand_ins: dict[str, LayerFunction], tokens: Tensor) -> Float[Tensor, ""]:
    """Return the mean over tokens of KL(unquantized || quantized) in nats."""
    with torch.no_grad():
        wanted = functional.log_softmax(problem.logits({}, tokens).to(torch.float32), -1)
    got = functional.log_softmax(problem.logits(stand_ins, tokens).to(torch.float32), -1)
    return functional.kl_div(got.flatten(0, -2), wanted.flatten(0, -2), log_target=True, reduction="batchmean")


@torch.no_grad()
def held_out_divergence(problem: ModelProblem, stand_ins: dict[str, LayerFunction], windows: Tensor) -> float:
    """Return the mean :func:`divergence` of windows, 0 of none."""
    if not len(windows):
        return 0.0
    found = [float(divergence(problem, stand_ins, window)) for window in windows.split(1)]
    return sum(found) / len(found)


class _LearnedGroup:
    """The weights of a group and the matrix of its input, as parameters.

    The weights are those of the inputs behind the transforms that the layers have already (the order of segments).
    """

    def __init__(self, group: GroupTask, options: Distill) -> None:
        self.group = group
        self.weights = [layer.target.detach().clone().requires_grad_() for layer in group.layers]
        self.size = fitting_size(group.cols, options.size) if options.transform != "none" else 1
        self.is_learned = options.transform in ("block", "shared") and self.size > 1
        like = group.layers[0].weight
        count = group.cols // self.size if options.transform == "block" else 1
        self.matrix = hadamard_matrix(self.size, like.detach()).repeat(count, 1, 1).requires_grad_(self.is_learned)

    def stand_ins(self, problem: ModelProblem) -> dict[str, LayerFunction]:
        """Return what each layer computes while it learns."""
        return {
            layer.name: self._stand_in(layer, weight, problem.biases[layer.name])
            for layer, weight in zip(self.group.layers, self.weights, strict=True)
        }

    def _stand_in(self, layer: LayerTask, weight: Tensor, bias: Tensor | None) -> LayerFunction:
        def run(inputs: Tensor) -> Tensor:
            inputs = self._turned(apply_transforms(inputs, layer.transforms), self.matrix)
            rounded = straight_through_inputs(inputs, layer.activations)
            return functional.linear(rounded, straight_through(self._turned_weight(weight), layer.format), bias)

        return run

    def _turned(self, inputs: Tensor, matrix: Tensor) -> Tensor:
        return inputs if self.size == 1 else block_product(inputs, matrix)

    def _turned_weight(self, weight: Tensor) -> Tensor:
        if self.size == 1:
            return weight
        matrix = torch.linalg.inv(self.matrix).transpose(1, 2) if self.is_learned else self.matrix
        return block_product(weight, matrix)

    def result(self) -> GroupTask:
        """Return the group with what was learned."""
        layers = tuple(
            dataclasses.replace(layer, weight=restore_weight(weight.detach(), layer.transforms), clip=None)
            for layer, weight in zip(self.group.layers, self.weights, strict=True)
        )
        if self.size > 1:
            cols = self.group.cols
            learned = block_transform(self.matrix.detach(), cols) if self.is_learned else None
            transform = learned or hadamard_transform(cols, self.size)
            layers = tuple(layer.with_transforms([transform]) for layer in layers)
        return dataclasses.replace(self.group, layers=layers)
