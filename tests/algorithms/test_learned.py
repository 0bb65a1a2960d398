"""What methods learn: gradients of clips, Kronecker factors, Cayley steps, macro-block factors, options."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from method_tasks import COLS, block_problem, group_task, input_rows, layer_task, model_problem, random
from microscale.algorithms import (
    BlockStep,
    FoldStep,
    GroupTask,
    ModelProblem,
    ModelStep,
    RotationProblem,
    RotationStep,
    parse_method,
)
from microscale.algorithms.batquant import BatQuant
from microscale.algorithms.block_error import block_error
from microscale.algorithms.distill import ENOUGH_TOKENS
from microscale.algorithms.flatquant import FlatQuant, kronecker_sizes
from microscale.algorithms.macro_block import MacroBlock
from microscale.algorithms.objective import group_error
from microscale.algorithms.rotation import start_rotation
from microscale.algorithms.spinquant import SpinQuant, cayley_step, token_loss
from microscale.algorithms.straight_through import clipped_rounding
from microscale.errors import CalibrationError, RecipeError
from microscale.families import Batch
from microscale.formats import parse_format
from microscale.kernels import fake_quantize
from microscale.recipes.folding import keep_mean
from small_models import same_bits


def test_a_clipped_rounding_passes_gradients() -> None:
    weight = random(4, 64).requires_grad_()
    limit = torch.full((4, 64), 1.2, requires_grad=True)
    fmt = parse_format("mxfp4")
    rounded = clipped_rounding(weight, limit, fmt)
    assert torch.equal(rounded, fake_quantize(weight.detach().clamp(-1.2, 1.2), fmt))
    rounded.sum().backward()
    is_inside = weight.detach().abs() <= 1.2
    assert weight.grad is not None and limit.grad is not None
    assert torch.equal(weight.grad, is_inside.to(torch.float32))
    change = torch.where(is_inside, rounded - weight, rounded).detach() / 1.2
    torch.testing.assert_close(limit.grad, change)
    assert float((limit.grad * rounded.detach().sign())[~is_inside].min()) > 0, "a wider clip lets outliers grow"


@pytest.mark.parametrize(("cols", "sizes"), [(64, (8, 8)), (96, (8, 12)), (704, (22, 32)), (7, (1, 7)), (1, (1, 1))])
def test_kronecker_factors(cols: int, sizes: tuple[int, int]) -> None:
    assert kronecker_sizes(cols) == sizes


@pytest.mark.parametrize("mode", ["block", "shared", "gpk"])
def test_modes_of_block_transforms(mode: str) -> None:
    problem = block_problem()
    learned = BatQuant(mode=mode, epochs=4).learn(problem)
    (transform,) = learned[0].layers[0].transforms
    matrix = transform.parts["matrix"]
    assert str(transform.spec) == ("block(32,shared)" if mode == "shared" else "block(32)")
    assert not torch.allclose(matrix[0], matrix[0].T), "it has left its start"
    if mode == "gpk":  # private[k] (x) shared: 4x4 and 8x8 parts of one rank
        parts = matrix.reshape(-1, 4, 8, 4, 8).permute(0, 1, 3, 2, 4).reshape(-1, 64)
        assert int(torch.linalg.matrix_rank(parts, rtol=1e-4)) == 1
    assert block_error(problem, learned) < block_error(problem, problem.groups)


def test_widths_that_no_block_divides() -> None:
    """40 = 8 * 5 takes blocks of 8; a Kronecker product takes any width."""
    problem = block_problem(width=40)
    for learning in (BatQuant(epochs=2), FlatQuant(epochs=2)):
        learned = learning.learn(problem)
        assert block_error(problem, learned) <= block_error(problem, problem.groups)


@pytest.mark.parametrize("text", ["batquant:epochs=1", "flatquant:epochs=1", "omniquant:epochs=1", "autoround:steps=2"])
def test_a_loss_that_is_not_finite_is_named(text: str) -> None:
    learning = parse_method(text).steps[0]
    assert isinstance(learning, BlockStep)
    problem = block_problem()
    broken = dataclasses.replace(problem, targets=[target * torch.nan for target in problem.targets])
    with pytest.raises(CalibrationError, match=rf"{learning.name}: the loss became"):
        learning.learn(broken)


@pytest.mark.parametrize(
    "text",
    [
        "batquant:mode=some",
        "batquant:size=24",
        "flatquant:epochs=-1",
        "omniquant:scale=false,clip=false",
        "spinquant:batch=0",
        "macroblock:size=0",
    ],
)
def test_options_that_make_no_sense(text: str) -> None:
    with pytest.raises(RecipeError, match=text.partition(":")[0]):
        parse_method(text)


def check_orthogonal(turn: Tensor) -> None:
    wide = turn.to(torch.float64)
    assert float((wide.T @ wide - torch.eye(len(wide), dtype=torch.float64)).abs().max()) < 1e-5


def rotation_problem(*, keeps_mean: bool = False) -> RotationProblem:
    same: Callable[[Tensor], Tensor] = lambda turn: turn  # noqa: E731
    return RotationProblem(
        size=COLS,
        readers=frozenset({"layers.0.mix"}),
        writers=frozenset(),
        keeps_mean=keeps_mean,
        admissible=keep_mean if keeps_mean else same,
        model=model_problem(),
    )


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("text", ["quarot", "spinquant:steps=6"])
def test_rotations(text: str, keeps_mean: bool) -> None:
    rotating = parse_method(text).steps[0]
    assert isinstance(rotating, RotationStep)
    problem = rotation_problem(keeps_mean=keeps_mean)
    turn = rotating.rotation(problem)
    check_orthogonal(turn)
    assert same_bits(turn, rotating.rotation(problem))
    head = rotating.head_rotation(16, 0)
    assert head is not None
    check_orthogonal(head)
    if keeps_mean and rotating.is_learned:
        ones = torch.ones(COLS, dtype=torch.float64)
        torch.testing.assert_close(turn.T @ ones, ones, rtol=0, atol=1e-4)


def test_spinquant_is_never_worse_than_its_start() -> None:
    problem = rotation_problem()
    assert problem.model is not None
    windows = problem.model.windows
    start = start_rotation(COLS, 0).to(torch.float32)
    learned = SpinQuant(steps=12, batch=6).rotation(problem).to(torch.float32)
    with torch.no_grad():
        before, after = (float(token_loss(problem, problem.model, turn, windows)) for turn in (start, learned))
    assert after <= before


def test_cayley_steps_go_down_and_stay_orthogonal() -> None:
    """The nearest rotation to a given one is found: |R - T|^2 falls at every step."""
    wanted, turn = start_rotation(24, 1).to(torch.float32), start_rotation(24, 2).to(torch.float32)
    if torch.linalg.det(wanted) * torch.linalg.det(turn) < 0:
        wanted = torch.cat([-wanted[:1], wanted[1:]])
    distances: list[float] = []
    for _ in range(60):
        distances.append(float((turn - wanted).square().sum()))
        turn = cayley_step(turn, 2 * (turn - wanted), 0.5)
        check_orthogonal(turn)
    assert all(later <= earlier + 1e-4 for earlier, later in itertools.pairwise(distances))
    assert distances[-1] < 0.5 * distances[0]


@pytest.mark.parametrize("size", [1, 2, 12, 32, 45])
def test_rotations_to_start_from(size: int) -> None:
    check_orthogonal(start_rotation(size, 3))
    assert same_bits(start_rotation(size, 3), start_rotation(size, 3))
    assert size < 12 or not torch.equal(start_rotation(size, 3), start_rotation(size, 4))


def test_macro_block_factors() -> None:
    """One factor for each run of 128 channels, from the 16 of the paper's search, and better than none."""
    inputs = input_rows(cols=320)
    group = group_task(layer_task(cols=320, inputs=inputs), layer_task(cols=320, inputs=inputs, seed=1, name="other"))
    scale = MacroBlock().input_scale(group)
    for run in scale.split(128):
        assert len(run.unique()) == 1 and float(run[0] * 16) % 1 == 0 and 1 <= float(run[0]) < 2
    assert group_error(group, scale) < group_error(group, torch.ones(320))


def learned_from(problem: ModelProblem, options: str) -> GroupTask:
    step = parse_method(f"distill:{options}").steps[0]
    assert isinstance(step, ModelStep)
    with torch.enable_grad():
        return step.learn(problem)[0]


def test_what_distillation_made_worse_is_taken_back() -> None:
    """Held-out windows decide; without any (a single window) what was learned stays."""
    told: list[str] = []
    problem = dataclasses.replace(model_problem(), tell=told.append)
    start = learned_from(problem, "epochs=0")
    wild = f"epochs=2,lr={100 * ENOUGH_TOKENS / problem.windows.token_ids.numel():g}"
    back = learned_from(problem, wild)
    assert torch.equal(back.layers[0].weight, start.layers[0].weight)
    assert len(told) == 1 and "1 held-out window(s)" in told[0] and "the weights stay as they were" in told[0]
    alone = dataclasses.replace(problem, windows=problem.windows[:1])
    moved = learned_from(alone, wild)
    assert not torch.equal(moved.layers[0].weight, start.layers[0].weight) and len(told) == 1


def test_few_tokens_take_less_of_the_learning_rate() -> None:
    """The first step of Adam moves a weight by its rate: twice the tokens, twice the way."""
    small = model_problem()
    large = dataclasses.replace(small, windows=Batch(token_ids=small.windows.token_ids.repeat(2, 1)))
    start = learned_from(small, "epochs=0,transform=none").layers[0].weight
    ways: list[float] = []
    for problem in (small, large):
        one = 1 / (len(problem.windows) - 1)  # of an epoch: one window, one step
        moved = learned_from(problem, f"epochs={one},transform=none,lr=0.01").layers[0].weight
        ways.append(float((moved - start).abs().max()))
    assert ways[0] > 0 and ways[1] == pytest.approx(2 * ways[0], rel=1e-3)


def smoothing(options: str, group: GroupTask) -> Tensor:
    step = parse_method(f"smoothquant{options}").steps[0]
    assert isinstance(step, FoldStep)
    return step.input_scale(group)


def test_smoothing_that_gains_too_little_is_left_out() -> None:
    """Outlier channels that meet small weights gain much; the factor that they gain is the bar."""
    outliers = torch.ones(COLS)
    outliers[3::32] = 40.0
    rows = random(192, COLS, seed=3)
    layer = layer_task(inputs=rows * outliers)
    easy = group_task(dataclasses.replace(layer, weight=layer.weight / outliers))
    none = torch.ones(COLS)
    gain = group_error(easy, none) / group_error(easy, smoothing("", easy))
    assert gain > 3
    assert torch.equal(smoothing(f":gain={0.99 * gain}", easy), smoothing("", easy))
    assert torch.equal(smoothing(f":gain={1.01 * gain}", easy), none)
    flat = group_task(layer_task(inputs=rows))
    assert torch.equal(smoothing(":gain=3", flat), none) and not torch.equal(smoothing("", flat), none)
    with pytest.raises(RecipeError, match="gain is 0 or more"):
        parse_method("smoothquant:gain=-1")


def test_the_scales_of_smoothing_are_near_one() -> None:
    """A common power of two is taken out: nothing changes but what a folded norm looks like."""
    group = group_task(layer_task(inputs=input_rows() * 300))
    scale = smoothing("", group)
    assert abs(float(scale.log2().mean())) <= 0.5 + 1e-6
    inputs, weights = group.inputs, group.layers[0].weight.abs().amax(0)
    assert inputs is not None
    ratio = scale / (inputs.amax / weights).sqrt()  # arXiv 2211.10438 equation 4 with alpha = 1/2
    torch.testing.assert_close(ratio, ratio[:1].expand(COLS))
    assert float(ratio[0].log2()) == pytest.approx(round(float(ratio[0].log2())), abs=1e-5)


@pytest.mark.parametrize("method", ["awq", "smoothquant:search=true"])
def test_searches_judge_the_scale_that_will_be_folded(method: str) -> None:
    """Heads that share a value share its scale: the best of what can be folded is found, not shared afterwards."""

    def share(scale: Tensor) -> Tensor:
        return scale.reshape(2, -1).log().mean(0).exp().repeat(2)

    step = parse_method(method).steps[0]
    assert isinstance(step, FoldStep)
    group = dataclasses.replace(group_task(layer_task(inputs=input_rows() * torch.linspace(1, 30, COLS))), share=share)
    found = step.input_scale(group)
    torch.testing.assert_close(found, share(found))
    alone = step.input_scale(dataclasses.replace(group, share=lambda scale: scale))
    assert group_error(group, found) <= group_error(group, share(alone))
    if method == "awq":
        assert group_error(group, found) <= group_error(group, torch.ones(COLS))
