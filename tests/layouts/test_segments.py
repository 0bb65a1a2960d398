"""Parts of segments: their names, their shapes, and moves that reach each segment by itself."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from microscale.errors import ShapeError
from microscale.formats import BlockFormat, SegmentedFormat, format_name, parse_format
from microscale.kernels import quantize
from microscale.layouts.segments import first_refusal, name_parts, prefix, relayout, shapes, split_parts


def segmented(text: str = "segments(mxfp4*64,mxfp8*32,mxfp4*7)") -> SegmentedFormat:
    found = parse_format(text)
    assert isinstance(found, SegmentedFormat)
    return found


@pytest.mark.parametrize("shape", [(103,), (5, 103), (2, 0, 103)])
def test_shapes(shape: tuple[int, ...]) -> None:
    found = [(format_name(fmt), own) for fmt, own in shapes(segmented(), shape)]
    lead = shape[:-1]
    assert found == [("mxfp4", (*lead, 64)), ("mxfp8_e4m3", (*lead, 32)), ("mxfp4", (*lead, 7))]


@pytest.mark.parametrize("shape", [(), (102,), (103, 5)])
def test_another_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError) as caught:
        shapes(segmented(), shape)
    assert f"is for tensors of 103 columns, got the shape {list(shape)}" in str(caught.value)


def test_parts_are_those_of_each_segment_alone() -> None:
    values = torch.randn(3, 103, generator=torch.Generator().manual_seed(0))
    parts = quantize(values, segmented()).parts
    assert set(parts) == {f"s{i}_{name}" for i in range(3) for name in ("codes", "scale")}
    starts = (0, 64, 96, 103)
    for i, own in enumerate(split_parts(parts, segmented())):
        alone = quantize(values[:, starts[i] : starts[i + 1]].contiguous(), ("mxfp4", "mxfp8", "mxfp4")[i])
        assert set(own) == set(alone.parts)
        assert all(torch.equal(part, alone.parts[name]) for name, part in own.items())


def test_the_eleventh_segment_is_not_taken_for_the_second() -> None:
    """s1_ is no beginning of s10_codes, though s1 is."""
    many = segmented(f"segments({','.join(['mxfp4*1'] * 12)})")
    parts = {f"{prefix(i)}codes": i for i in range(12)}
    assert split_parts(parts, many) == [{"codes": i} for i in range(12)]


@given(
    names=st.lists(st.sets(st.sampled_from(["codes", "scale", "s0_odd", "index"]), max_size=4), min_size=1, max_size=12)
)
def test_parts_are_split_and_joined_again(names: list[set[str]]) -> None:
    segments = [{name: (i, name) for name in sorted(own)} for i, own in enumerate(names)]
    joined = name_parts(segments)
    assert len(joined) == sum(map(len, names))
    assert split_parts(joined, segmented(f"segments({','.join(['mxfp4*1'] * len(names))})")) == segments


def test_the_first_refusal_says_of_which_segment_it_is() -> None:
    def narrow(fmt: BlockFormat, shape: tuple[int, ...]) -> str | None:
        return f"no place for {shape[-1]} columns" if shape[-1] < 64 else None

    assert first_refusal(narrow, segmented(), (2, 103)) == "mxfp8_e4m3: no place for 32 columns"
    assert first_refusal(narrow, segmented("segments(mxfp4*64,mxfp8*64)"), (2, 128)) is None
    with pytest.raises(ShapeError):
        first_refusal(narrow, segmented(), (2, 64))


def test_a_move_sees_each_segment_with_its_own_names_and_shape() -> None:
    parts = quantize(torch.ones(2, 103), segmented()).parts
    seen: list[tuple[str, tuple[int, ...], list[str]]] = []

    def move(own: Mapping[str, Tensor], fmt: BlockFormat, shape: tuple[int, ...]) -> dict[str, Tensor]:
        seen.append((format_name(fmt), shape, sorted(own)))
        return {"turned": own["codes"].T}

    moved = relayout(move, parts, segmented(), (2, 103))
    both = ["codes", "scale"]
    assert seen == [("mxfp4", (2, 64), both), ("mxfp8_e4m3", (2, 32), both), ("mxfp4", (2, 7), both)]
    assert list(moved) == ["s0_turned", "s1_turned", "s2_turned"]
    assert torch.equal(moved["s1_turned"], parts["s1_codes"].T)
