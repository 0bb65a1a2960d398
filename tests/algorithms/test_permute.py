"""Permutation: channels are dealt to the blocks by rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from method_problems import group_problem, input_rows, layer_problem
from microscale.algorithms.contract import GroupProblem
from microscale.algorithms.permute import Permute
from microscale.calibration.statistics import Wanted
from microscale.formats import parse_format


def test_a_permutation_deals_the_outliers_one_to_a_block() -> None:
    """Its own objective (MX+, table 12): blocks with more than one of the largest channels."""
    inputs = input_rows(cols=256)
    inputs[:, 40:48] *= 30.0  # eight outliers in one of eight blocks
    group = group_problem(layer_problem("mxfp4_plus", "mxfp4_plus", cols=256, inputs=inputs))
    (permutation,) = Permute().transforms(group)
    order = permutation.parts["order"].tolist()
    blocks = [sum(channel in range(40, 48) for channel in order[i : i + 32]) for i in range(0, 256, 32)]
    assert blocks == [1] * 8


def order_of(group: GroupProblem) -> list[int]:
    """Return which channel stands where."""
    (transform,) = Permute().transforms(group)
    return transform.parts["order"].tolist()


def test_four_channels_by_hand() -> None:
    """Ranks by the largest input: 2, 0, 3, 1. Two blocks of two: the first takes ranks 0 and 2, the other 1 and 3."""
    inputs = torch.tensor([[5.0, 0.5, -9.0, 0.0], [-1.0, 0.25, 2.0, 1.0]])
    group = group_problem(layer_problem("e2m1/2:e8m0", None, rows=3, cols=4, inputs=inputs))
    assert order_of(group) == [2, 3, 0, 1]


@settings(max_examples=30)
@given(seed=st.integers(0, 200), blocks=st.integers(2, 5))
def test_every_block_holds_one_of_each_rank(seed: int, blocks: int) -> None:
    cols = blocks * 4
    inputs = torch.randint(0, 6, (3, cols), generator=torch.Generator().manual_seed(seed)).to(torch.float32)
    order = order_of(group_problem(layer_problem("e2m1/4:e8m0", None, rows=2, cols=cols, inputs=inputs)))
    assert sorted(order) == list(range(cols))
    amax = inputs.abs().amax(0)
    dealt = amax[order].reshape(blocks, 4)
    assert torch.equal(dealt.T.flatten(), amax.sort(descending=True).values), "round by round the ranks fall"


def test_equal_channels_keep_their_order() -> None:
    group = group_problem(layer_problem("e2m1/2:e8m0", None, rows=2, cols=6, inputs=torch.ones(2, 6)))
    assert order_of(group) == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(("fmt", "cols"), [("mxfp4", 32), ("mxfp4", 48), ("e2m1/tensor:fp32", 64), ("mxfp4", 1)])
def test_where_no_order_is_better(fmt: str, cols: int) -> None:
    """One block, a width of broken blocks, no blocks at all."""
    assert Permute().transforms(group_problem(layer_problem(fmt, None, cols=cols))) == ()


@pytest.mark.parametrize(
    ("spec", "is_dealt"),
    [
        ("mxfp4", True),
        ("nvfp4", True),
        ("segments(mxfp4*32,mxfp8*32)", True),
        ("adaptive_2_4", False),
        ("e2m1/16x16:e8m0", False),
        ("int8/channel:fp32", False),
    ],
)
def test_formats_without_blocks_of_a_row(spec: str, is_dealt: bool) -> None:
    reason = "channels are dealt to the blocks of a row, and it has none"
    assert Permute().idleness(parse_format(spec), None) == (None if is_dealt else reason)
    assert Permute().wanted == Wanted.RANGE and Permute().is_online
