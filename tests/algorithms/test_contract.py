"""The records that methods get, and what a step says of itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from method_problems import COLS, group_problem, input_rows, layer_problem, random
from microscale.algorithms.balance import Balance
from microscale.algorithms.contract import SegmentStep, Step, TransformStep, as_it_is, clipped, forget, option_word
from microscale.algorithms.registry import STEPS
from microscale.formats import parse_format
from microscale.kernels.transform import apply_transforms
from microscale.transforms import block_transform, hadamard_transform, permute_transform, scale_transform

CHAIN = (
    permute_transform(torch.arange(COLS).flip(0)),
    scale_transform(torch.linspace(0.5, 2, COLS)),
    hadamard_transform(COLS, 32),
    block_transform(torch.eye(32).repeat(2, 1, 1) + 0.1 * random(2, 32, 32), COLS),
)


@pytest.mark.parametrize("length", range(len(CHAIN) + 1))
def test_the_target_is_the_weight_of_the_transformed_inputs(length: int) -> None:
    layer = layer_problem(activations=None).with_transforms(CHAIN[:length])
    x = random(5, COLS, seed=3)
    expected = x @ layer.weight.T
    torch.testing.assert_close(apply_transforms(x, layer.transforms) @ layer.target.T, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", range(len(CHAIN) + 1))
def test_the_second_moment_is_that_of_the_transformed_inputs(length: int) -> None:
    rows = input_rows(96)
    layer = layer_problem(inputs=rows).with_transforms(CHAIN[:length])
    turned = apply_transforms(rows, layer.transforms).double()
    moment = layer.second_moment
    assert moment is not None
    expected = turned.T @ turned / 96
    torch.testing.assert_close(moment.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_moment_that_was_not_measured() -> None:
    layer = layer_problem()
    assert layer.inputs is not None
    for inputs in (None, dataclasses.replace(layer.inputs, second_moment=None)):
        assert dataclasses.replace(layer, inputs=inputs).second_moment is None
    assert layer_problem(inputs=input_rows(0)).second_moment is None, "nor is one of no token"


def test_more_transforms_forget_clip_and_offset() -> None:
    plain = layer_problem()
    layer = dataclasses.replace(plain, clip=torch.ones(48, COLS), offset=torch.ones(48, COLS), transforms=CHAIN[:1])
    turned = layer.with_transforms(CHAIN[1:3])
    assert turned.transforms == CHAIN[:3] and turned.clip is None and turned.offset is None
    assert layer.clip is not None and layer.transforms == CHAIN[:1], "the problem itself stays"


def test_a_clip_bounds_each_number() -> None:
    clip = torch.tensor([[1.0, 2.0, 0.0, torch.inf]])
    layer = dataclasses.replace(layer_problem(), weight=torch.zeros(1, 4), clip=clip)
    target = torch.tensor([[3.0, -3.0, 5.0, -7.0]])
    assert clipped(target, layer).tolist() == [[1.0, -2.0, 0.0, -7.0]]
    assert clipped(target, layer_problem()) is target


def test_a_group_sees_what_its_layers_see() -> None:
    layers = [layer_problem(seed=i, name=f"{i}").with_transforms(CHAIN[:2]) for i in range(2)]
    group = group_problem(*layers)
    assert group.inputs is not None and group.inputs.sample is not None
    assert group.cols == COLS and torch.equal(group.sample, apply_transforms(group.inputs.sample, CHAIN[:2]))
    scale = random(COLS)
    assert group.share(scale) is scale and as_it_is(scale) is scale and not group.is_order_folded
    forget("nobody hears of it")


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (True, "true"),
        (False, "false"),
        (3, "3"),
        (-1, "-1"),
        (2.0, "2"),
        (0.01, "0.01"),
        (1e-7, "1e-07"),
        (1e9, "1e09"),
        (0.012345678, "0.012345678"),
        ("plus", "plus"),
    ],
)
def test_options_as_words(value: object, word: str) -> None:
    assert option_word(value) == word


@settings(max_examples=50)
@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_lasts_through_its_word(number: float) -> None:
    word = option_word(number)
    assert float(word) == number and "+" not in word and "," not in word


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(Step):
    """A step with one option of each kind."""

    name: ClassVar[str] = "sample"
    count: int = 2
    share: float = 0.5
    flag: bool = False
    word: str = "all"


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Sample(), "sample"),
        (Sample(count=2, share=0.5), "sample"),
        (Sample(flag=True, share=1e-3), "sample:share=0.001,flag=true"),
        (Sample(word="few", count=-1), "sample:count=-1,word=few"),
    ],
)
def test_a_step_says_what_is_no_default(step: Step, text: str) -> None:
    assert step.text == text


def test_a_step_that_says_nothing_of_itself_hinders_nothing() -> None:
    step, fmt = Sample(), parse_format("mxfp4")
    assert (step.wanted, step.budget, step.next_step, step.segment_obstacle) == (None,) * 4
    assert step.refusal(fmt, None) is None and step.idleness(fmt, None) is None
    assert not step.is_online and not step.has_budget and step.repeated((fmt, None), (fmt, None)) is step
    with pytest.raises(NotImplementedError):
        step.with_budget(4.0)


def test_which_steps_leave_something_for_run_time() -> None:
    online = {name for name, kind in STEPS.items() if kind().is_online}
    assert online == {"distill", "permute", "hadamard", "micromix", "omniquant", "flatquant", "batquant", "lowrank"}


def test_which_steps_may_stand_beside_segments() -> None:
    beside = {name for name, kind in STEPS.items() if kind().segment_obstacle is None}
    assert beside == {
        "rule",
        "mxplus",
        "smoothquant",
        "awq",
        "macroblock",
        "micromix",
        "autoround",
        "rtn",
        "gptq",
        "refine",
        "lowrank",
    }
    assert Balance(size=1).segment_obstacle is None
    mixing = [kind().segment_obstacle for kind in STEPS.values() if issubclass(kind, TransformStep)]
    assert all("their order is lost" in str(obstacle) for obstacle in mixing) and len(mixing) == 2


def test_who_has_a_budget() -> None:
    spending = [name for name, kind in STEPS.items() if kind.has_budget]
    assert spending == ["micromix"] and issubclass(STEPS["micromix"], SegmentStep)
    for kind in STEPS.values():
        if not kind.has_budget:
            with pytest.raises(NotImplementedError):
                kind().with_budget(5.0)
