"""What methods that learn have in common: clips by the block, groups that learn, and losses that left the numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from method_problems import COLS, block_problem, group_problem, input_rows, layer_problem, random
from microscale.algorithms.contract import BlockStep, LayerProblem
from microscale.algorithms.learned import LearnedClip, LearnedTransform, is_seen, learn_groups
from microscale.algorithms.pipeline import parse_method
from microscale.errors import CalibrationError
from microscale.formats import parse_format
from microscale.kernels import fake_quantize
from microscale.transforms import Transform, hadamard_transform, scale_transform


@pytest.mark.parametrize("text", ["batquant:epochs=1", "flatquant:epochs=1", "omniquant:epochs=1", "autoround:steps=2"])
def test_a_loss_that_is_not_finite_is_named(text: str) -> None:
    learning = parse_method(text).steps[0]
    assert isinstance(learning, BlockStep)
    problem = block_problem()
    broken = dataclasses.replace(problem, targets=[target * torch.nan for target in problem.targets])
    with pytest.raises(CalibrationError, match=rf"{learning.name}: the loss became"):
        learning.learn(broken)


@pytest.mark.parametrize(
    ("width", "expected"),
    [(2, [4.0, 4.0, 8.0, 8.0, 1.0]), (5, [8.0] * 5), (3, [4.0, 4.0, 4.0, 8.0, 8.0]), (1, [2.0, 4.0, 0.0, 8.0, 1.0])],
)
def test_a_clip_is_a_share_of_each_block(width: int, expected: list[float]) -> None:
    """Blocks of a row, the last one ragged; it starts at sigmoid(4) = 0.982 of the largest magnitude."""
    weight = torch.tensor([[2.0, -4.0, 0.0, 8.0, -1.0]])
    clip = LearnedClip((1, 5), width, torch.device("cpu"))
    assert clip.parameter.shape == (1, -(-5 // width))
    torch.testing.assert_close(clip.limit(weight).detach(), torch.tensor([expected]) / (1 + math.exp(-4)))
    with torch.no_grad():
        clip.parameter[0, -1] = 0.0
    assert clip.limit(weight)[0, 4].item() == expected[4] / 2, "the middle of a sigmoid"


def test_a_clip_learns_by_its_block_alone() -> None:
    weight = torch.tensor([[2.0, -4.0, 0.0, 8.0]]).requires_grad_()
    clip = LearnedClip((1, 4), 2, torch.device("cpu"))
    clip.limit(weight)[0, :2].sum().backward()
    share = 1 / (1 + math.exp(-4))
    assert clip.parameter.grad is not None and weight.grad is None
    assert clip.parameter.grad[0].tolist() == pytest.approx([2 * 4.0 * share * (1 - share), 0.0], rel=1e-5)


class Doubled(LearnedTransform):
    """x -> 2 x, W -> W / 2: nothing is learned."""

    def turn(self, inputs: Tensor) -> Tensor:
        return inputs * 2

    def turn_weight(self, weight: Tensor) -> Tensor:
        return weight / 2

    def transforms(self) -> tuple[Transform, ...]:
        return (scale_transform(torch.full((self.group.cols,), 2.0)),)


@pytest.mark.parametrize(("fmt", "has_clip"), [("mxfp4", True), ("mxfp4", False), ("e2m1/16x16:e8m0", True)])
def test_the_result_is_the_group_with_transform_and_clip(fmt: str, has_clip: bool) -> None:
    before = hadamard_transform(COLS, 16)
    group = group_problem(layer_problem(fmt).with_transforms([before]))
    learner = Doubled(group)
    if has_clip:
        learner.learn_clips()
    (layer,) = learner.result().layers
    assert [str(transform.spec) for transform in layer.transforms] == ["hadamard(16)", "scale"], "behind what is there"
    torch.testing.assert_close(layer.target, group.layers[0].target / 2)
    is_clipped = has_clip and fmt == "mxfp4"  # tiles are no blocks of a row, so that they have no clip of their own
    assert (layer.clip is not None) is is_clipped and len(learner.clip_parameters) == is_clipped


@pytest.mark.parametrize("has_clip", [False, True])
def test_what_stands_in_computes_with_rounded_parts(has_clip: bool) -> None:
    """A power of two changes no rounding: doubled and halved is the plain layer, but for what the clip takes."""
    group = group_problem(layer_problem("mxfp4", None))
    name, x = group.layers[0].name, random(3, COLS, seed=4)
    learner, weight = Doubled(group), group.layers[0].weight
    if has_clip:
        learner.learn_clips()
        bound = weight.unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1) / (1 + math.exp(-4))
        weight = weight.clamp(-bound, bound)
    found = learner.stand_ins({name: None})[name](x)
    torch.testing.assert_close(found, x @ fake_quantize(weight, parse_format("mxfp4")).T)


def test_groups_that_saw_no_token() -> None:
    group = group_problem()
    assert is_seen(group) and not is_seen(dataclasses.replace(group, inputs=None))
    assert not is_seen(group_problem(layer_problem(inputs=input_rows(0))))


def test_a_group_without_a_learner_stays() -> None:
    problem = block_problem()
    learners = [Doubled(problem.groups[0])]
    first, second = learn_groups(problem, learners, [], lambda step, steps: None, steps=0, what="nothing")
    assert second is problem.groups[1] and first.layers[0].transforms, "equal errors: the later state counts"


def test_what_was_worse_is_not_kept() -> None:
    """A transform that undoes nothing (W is not halved in turn) makes the outputs wrong: the start is the best."""

    class Wrong(Doubled):
        def layers(self) -> tuple[LayerProblem, ...]:
            return tuple(dataclasses.replace(layer, weight=layer.weight * 3) for layer in self.group.layers)

    problem = block_problem()
    learners = [Wrong(problem.groups[0])]
    found = learn_groups(problem, learners, [], lambda step, steps: None, steps=2, what="wrong")
    assert found is problem.groups
