"""SpinQuant: the rotation of the residual stream is learned, on the quantized model's own loss.

The loss is the cross-entropy of the next token of the calibration text. The rotation R stays orthogonal by Cayley
steps: with A = G R^T - R G^T, G the gradient, R becomes (1 + t/2 A)^-1 (1 - t/2 A) R. The unrotated model computes the
loss: a layer that reads the stream rounds x R and W R, one that writes into it rounds R^T W and turns its output back.

``values`` rotates the values of attention by random Hadamard matrices, head by head; the paper learns these too. Left
out: online rotations before down_proj (a step ``hadamard`` may follow) and of queries and keys.

Source: arXiv 2405.16406, sections 3 and 4; the bound of the step is that of arXiv 2002.01113, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from microscale.algorithms.contract import LayerProblem, ModelProblem, RotationProblem, RotationStep
from microscale.algorithms.fit import Judged, fit, line, step_batches
from microscale.algorithms.rotation import start_rotation
from microscale.algorithms.straight_through import StandIn
from microscale.errors import RecipeError
from microscale.families.batch import Batch

JUDGES = 4
"""Batches that the learned rotation and its start are compared on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpinQuant(RotationStep):
    """``steps`` Cayley steps of at most ``lr``, which falls to 0; each on ``batch`` windows."""

    name: ClassVar[str] = "spinquant"
    source: ClassVar[str] = "arXiv 2405.16406"
    is_learned: ClassVar[bool] = True

    steps: int = 100
    lr: float = 1.5
    batch: int = 2
    seed: int = 0
    values: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or self.lr < 0:
            raise RecipeError("spinquant: steps and lr are at least 0, batch at least 1")

    def windows_learned(self, count: int) -> float:
        """A batch in each step."""
        return self.steps * min(self.batch, count)

    def rotation(self, problem: RotationProblem) -> Float[Tensor, "size size"]:
        """Return the learned rotation, or its start where that has the smaller loss.

        Raises:
            CalibrationError: the loss left the finite numbers.
        """
        model = problem.model
        assert model is not None
        current = problem.admissible(start_rotation(problem.size, self.seed).to(model.windows.token_ids.device))
        leaf = current.to(torch.float32, copy=True).requires_grad_()
        turned = mean_keeping_step if problem.keeps_mean else cayley_step
        judges = tuple(model.windows[: JUDGES * self.batch].split(self.batch))

        def update(step: int, steps: int) -> None:
            nonlocal current
            assert leaf.grad is not None
            rate = self.lr * line(step, steps)
            current = turned(current, leaf.grad, rate)
            leaf.data.copy_(current)

        @torch.no_grad()
        def judge() -> Judged[Tensor]:
            return Judged(state=current, error=sum(float(token_loss(problem, model, leaf, part)) for part in judges))

        return fit(
            step_batches(len(model.windows), self.steps, batch=self.batch, seed=model.seed),
            lambda batch: token_loss(problem, model, leaf, model.windows[batch]),
            update,
            parameters=[leaf],
            start=judge(),
            judge=judge,
            name=self.name,
            remedy="lower lr",
            progress=lambda step, steps: model.progress(step, steps, self.name),
        ).best.state

    def head_rotation(self, size: int, index: int) -> Float[Tensor, "size size"] | None:
        """Return the rotation of the values of block ``index``."""
        return start_rotation(size, self.seed + 1 + index) if self.values else None


def token_loss(
    problem: RotationProblem, model: ModelProblem, rotation: Float[Tensor, "size size"], batch: Batch
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the next token of the model that is rotated and quantized."""
    stand_ins = {
        layer.name: _stand_in(problem, layer, rotation, model.biases[layer.name])
        for group in model.groups
        for layer in group.layers
    }
    logits = model.logits(stand_ins, batch).to(torch.float32)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.token_ids[:, 1:].flatten())


def _stand_in(problem: RotationProblem, layer: LayerProblem, rotation: Tensor, bias: Tensor | None) -> StandIn:
    reads, writes = layer.name in problem.readers, layer.name in problem.writers

    def operands(inputs: Tensor) -> tuple[Tensor, Tensor]:
        weight = layer.weight @ rotation if reads else layer.weight
        weight = rotation.T @ weight if writes else weight
        return inputs @ rotation if reads else inputs, weight

    def outputs(products: Tensor) -> Tensor:
        return products @ rotation.T if writes else products

    return StandIn(layer=layer, bias=bias, operands=operands, outputs=outputs)


def cayley_step(
    rotation: Float[Tensor, "size size"], gradient: Float[Tensor, "size size"], rate: float
) -> Float[Tensor, "size size"]:
    """Return the rotation after a step."""
    return _turned(rotation, _skew(rotation, gradient), rate)


def mean_keeping_step(
    rotation: Float[Tensor, "size size"], gradient: Float[Tensor, "size size"], rate: float
) -> Float[Tensor, "size size"]:
    """Return the rotation after a step that turns the vector of ones as before."""
    skew = _skew(rotation, gradient)
    skew = skew - skew.mean(0, keepdim=True)
    return _turned(rotation, skew - skew.mean(1, keepdim=True), rate)


def _skew(rotation: Tensor, gradient: Tensor) -> Tensor:
    wide, slope = rotation.to(torch.float64), gradient.to(torch.float64)
    return slope @ wide.T - wide @ slope.T


def _turned(rotation: Tensor, skew: Tensor, rate: float) -> Tensor:
    wide = rotation.to(torch.float64)
    step = min(rate, 1.0 / (float(torch.linalg.matrix_norm(skew, 1)) + 1e-8))
    unit = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    turned = torch.linalg.solve(unit + 0.5 * step * skew, (unit - 0.5 * step * skew) @ wide)
    return turned.to(rotation.dtype)
