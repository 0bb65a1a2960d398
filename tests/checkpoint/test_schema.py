"""Sizes of tensors known by their headers, and what no layout of plain weights can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microscale.checkpoint.schema import TensorInfo, has_bytes_of, online_refusal
from microscale.formats import BlockFormat, parse_format
from microscale.layer_spec import LayerSpec
from microscale.transforms import TransformKind, TransformSpec


@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from([torch.uint8, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64]),
)
def test_bytes_are_those_of_torch(shape: list[int], dtype: torch.dtype) -> None:
    """A scalar is one number, and an axis of length 0 leaves nothing."""
    info = TensorInfo(dtype=dtype, shape=tuple(shape))
    assert info.num_bytes == torch.empty(shape, dtype=dtype).untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"low_rank": 4}, "it has no place for a low-rank side path"),
        (
            {"transforms": (TransformSpec(kind=TransformKind.HADAMARD, size=32),), "low_rank": 4},
            "it has no place for online transforms (hadamard",
        ),
    ],
)
def test_what_works_at_run_time_has_no_place(fields: dict[str, Any], reason: str | None) -> None:
    layer = LayerSpec(name="l", format=parse_format("mxfp4"), shape=(4, 64), dtype=torch.float32, **fields)
    found = online_refusal(layer)
    assert found is None if reason is None else found is not None and found.startswith(reason)


@pytest.mark.parametrize(
    ("word", "is_same"),
    [
        ("mxfp4", True),
        ("mxfp4:even", True),
        ("mxfp4:rceil", True),
        ("mxfp8", False),
        ("nvfp4", False),
        ("mxfp4_plus", False),
        ("e2m1/16:e8m0", False),
    ],
)
def test_bytes_mean_the_same_whatever_rule_made_them(word: str, is_same: bool) -> None:
    base = parse_format("mxfp4")
    assert isinstance(base, BlockFormat)
    assert has_bytes_of(parse_format(word), base) == is_same
