"""The layouts by name: who may come, who may go, and that row_major changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from microscale.errors import LayoutError
from microscale.kernels import quantize
from microscale.layouts import LAYOUTS, add_layout, find_layout, part_specs, remove_layout

ROW_MAJOR = find_layout("row_major")
OTHER = dataclasses.replace(ROW_MAJOR, name="other")


@pytest.fixture(autouse=True)
def other_is_gone() -> Iterator[None]:
    yield
    if "other" in LAYOUTS:
        remove_layout("other")


@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "mxfp4_plus", "segments(mxfp4*32,mxfp8*8)", "mxfp4+sparse1%:fp8"])
def test_row_major_hands_the_parts_through(spec: str) -> None:
    tensor = quantize(torch.ones(3, 40), spec)
    specs = ROW_MAJOR.part_specs(tensor.format, (3, 40))
    assert specs == part_specs(tensor.format, (3, 40)) and set(specs) == set(tensor.parts)
    assert ROW_MAJOR.refusal(tensor.format, (3, 40)) is None
    for move in (ROW_MAJOR.pack, ROW_MAJOR.unpack):
        moved = move(tensor.parts, tensor.format, (3, 40))
        assert moved is not tensor.parts and all(moved[name] is part for name, part in tensor.parts.items())


def test_a_layout_comes_and_goes() -> None:
    before = list(LAYOUTS)
    add_layout(OTHER)
    add_layout(OTHER)  # the same one again is no second one
    assert [*before, "other"] == list(LAYOUTS) and find_layout("other") is OTHER
    remove_layout("other")
    assert list(LAYOUTS) == before
    with pytest.raises(LayoutError, match="unknown layout 'other' of a tensor; possible: row_major"):
        remove_layout("other")


def test_a_name_belongs_to_one() -> None:
    add_layout(OTHER)
    twin = dataclasses.replace(OTHER, refusal=lambda fmt, shape: "never")
    with pytest.raises(LayoutError, match="there is a layout 'other' already; give this one a name of its own"):
        add_layout(twin)
    assert find_layout("other") is OTHER, "who came first stays"


@pytest.mark.parametrize("name", ["", "Row_major", "swizzled", "row_major "])
def test_unknown_names(name: str) -> None:
    with pytest.raises(LayoutError, match=rf"unknown layout '{name}' of a tensor; possible: row_major.*rows16"):
        find_layout(name)


def test_names_are_texts() -> None:
    with pytest.raises(LayoutError, match=r"the name of a layout must be one of row_major, .*, got None"):
        find_layout(None)  # type: ignore[arg-type]


def test_the_table_is_read_only() -> None:
    with pytest.raises(TypeError):
        LAYOUTS["other"] = OTHER  # type: ignore[index]
