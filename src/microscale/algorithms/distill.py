"""End-to-end distillation: weights and block transforms learn together to keep the model's own predictions.

The quantized model runs with rounded weights and inputs; the KL mean_divergence of its predictions from those of the
unquantized model is what AdamW brings down, straight through the rounding. No label is used, so that the model is bent
back to itself and not to the calibration text. Inputs are rotated by a block Hadamard matrix on the way
(``transform``); on request every group of layers learns the matrices instead, from a Hadamard start: one for each
block, or one for all blocks of a group (``shared``, a few kilobytes in all).

Source: arXiv 2601.20088 (quantization-aware distillation: KL to the teacher alone); arXiv 2603.16590 (block-affine
transforms aligned with MX blocks); their combination, the start and the schedule are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from microscale.algorithms.contract import GroupProblem, LayerFunction, LayerProblem, ModelProblem, ModelStep
from microscale.algorithms.fit import Judged, adam, epoch_batches, fit, hold_out, warm_cosine
from microscale.algorithms.hadamard import fitting_size
from microscale.algorithms.learned import LearnedTransform, all_stand_ins
from microscale.errors import RecipeError, counted
from microscale.families.batch import Batch
from microscale.kernels.transform import block_product, hadamard_matrix, restore_weight
from microscale.transforms import Transform, block_transform, hadamard_transform

TRANSFORMS = ("block", "shared", "hadamard", "none")
ENOUGH_TOKENS = 32_768
"""Tokens of calibration from which on the learning rates are taken as they are; fewer take less in proportion."""


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

    def windows_learned(self, count: int) -> float:
        """All that are not held out, once in each epoch."""
        return self.epochs * len(hold_out(count, 0)[0])

    def learn(self, problem: ModelProblem) -> tuple[GroupProblem, ...]:
        """Return the groups with the learned weights and transforms.

        Raises:
            CalibrationError: the loss left the finite numbers.
        """
        groups = [_LearnedGroup(group, self) for group in problem.groups]
        stand_ins = all_stand_ins(groups, problem.biases)
        share = min(1.0, problem.windows.token_ids.numel() / ENOUGH_TOKENS)
        weights = [weight for group in groups for weight in group.weights]
        matrices = [group.matrix for group in groups if group.is_learned]
        parts = [(weights, share * self.lr), (matrices, share * self.lr_transform)]
        learned, held_out = (problem.windows[samples] for samples in hold_out(len(problem.windows), problem.seed))
        batches = epoch_batches(len(learned), self.epochs, batch=self.batch, seed=problem.seed)
        judges = held_out if batches else held_out[:0]

        def judge(state: Sequence[_LearnedGroup] | None = groups) -> Judged[Sequence[_LearnedGroup] | None]:
            return Judged(state=state, error=held_out_divergence(problem, stand_ins, judges))

        start = judge(None)
        found = fit(
            batches,
            lambda batch: mean_divergence(problem, stand_ins, learned[batch]),
            adam(parts, schedule=warm_cosine, betas=(0.9, 0.95), max_norm=1.0),
            parameters=[*weights, *matrices],
            start=start,
            judge=judge,
            name=self.name,
            remedy="lower lr or lr_transform",
            progress=lambda step, steps: problem.progress(step, steps, "distilling"),
        )
        if found.best.state is None:
            problem.tell(
                f"distill learned nothing that lasts: KL on {counted(len(held_out), 'held-out window')} went from"
                f" {start.error:.3g} to {found.last.error:.3g}, so the weights stay as they were; give more calibration"
                " text, or a lower lr"
            )
        best = found.best.state or [_LearnedGroup(group, self) for group in problem.groups]
        return tuple(group.result() for group in best)


def mean_divergence(problem: ModelProblem, stand_ins: Mapping[str, LayerFunction], batch: Batch) -> Float[Tensor, ""]:
    """Return the mean over tokens of KL(unquantized || quantized) in nats."""
    with torch.no_grad():
        wanted = functional.log_softmax(problem.logits({}, batch).to(torch.float32), -1)
    got = functional.log_softmax(problem.logits(stand_ins, batch).to(torch.float32), -1)
    return functional.kl_div(got.flatten(0, -2), wanted.flatten(0, -2), log_target=True, reduction="batchmean")


@torch.no_grad()
def held_out_divergence(problem: ModelProblem, stand_ins: Mapping[str, LayerFunction], windows: Batch) -> float:
    """Return the mean :func:`mean_divergence` of windows, 0 of none."""
    if not len(windows):
        return 0.0
    found = [float(mean_divergence(problem, stand_ins, window)) for window in windows.split(1)]
    return sum(found) / len(found)


class _LearnedGroup(LearnedTransform):
    """The weights of a group and the matrix of its input, as parameters.

    The weights are those of the inputs behind the transforms that the layers have already (the order of segments).
    """

    def __init__(self, group: GroupProblem, options: Distill) -> None:
        super().__init__(group)
        self.weights = [weight.detach().clone().requires_grad_() for weight in self.weights]
        self.size = fitting_size(group.cols, options.size) if options.transform != "none" else 1
        self.is_learned = options.transform in ("block", "shared") and self.size > 1
        like = group.layers[0].weight
        count = group.cols // self.size if options.transform == "block" else 1
        self.matrix = hadamard_matrix(self.size, like.detach()).repeat(count, 1, 1).requires_grad_(self.is_learned)

    def turn(self, inputs: Tensor) -> Tensor:
        """Return every block times its matrix."""
        return inputs if self.size == 1 else block_product(inputs, self.matrix)

    def turn_weight(self, weight: Tensor) -> Tensor:
        """Return every block times the inverse, transposed."""
        if self.size == 1:
            return weight
        matrix = torch.linalg.inv(self.matrix).transpose(1, 2) if self.is_learned else self.matrix
        return block_product(weight, matrix)

    def transforms(self) -> tuple[Transform, ...]:
        """Return the transform, learned or fixed."""
        if self.size == 1:
            return ()
        cols = self.group.cols
        learned = block_transform(self.matrix.detach(), cols) if self.is_learned else None
        return (learned or hadamard_transform(cols, self.size),)

    def layers(self) -> tuple[LayerProblem, ...]:
        """Return the layers with the weights that were learned."""
        return tuple(
            dataclasses.replace(layer, weight=restore_weight(weight.detach(), layer.transforms))
            for layer, weight in zip(self.group.layers, self.weights, strict=True)
        )
