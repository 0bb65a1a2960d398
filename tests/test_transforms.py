"""Transforms as records: their words, the parts that a checkpoint holds, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from microscale.errors import FormatError, ShapeError
from microscale.transforms import (
    Transform,
    TransformKind,
    TransformSpec,
    block_transform,
    hadamard_transform,
    kronecker_transform,
    parse_transform,
    permute_transform,
    scale_transform,
)

PARTS: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {
    "scale": {"scale": ((96,), torch.float32)},
    "permute": {"order": ((96,), torch.int32)},
    "hadamard(32)": {},
    "block(32)": {"matrix": ((3, 32, 32), torch.float32)},
    "block(32,shared)": {"matrix": ((1, 32, 32), torch.float32)},
    "kronecker(8,12)": {"left": ((8, 8), torch.float32), "right": ((12, 12), torch.float32)},
}
BYTES = {"scale": 384, "permute": 384, "hadamard(32)": 0, "block(32)": 12288, "block(32,shared)": 4096}
BYTES["kronecker(8,12)"] = 4 * (64 + 144)


@pytest.mark.parametrize("text", PARTS)
def test_parts_of_96_columns(text: str) -> None:
    spec = parse_transform(text)
    assert str(spec) == text and spec.part_specs(96) == PARTS[text] and spec.num_bytes(96) == BYTES[text]
    parts = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in PARTS[text].items()}
    assert Transform(spec=spec, cols=96, parts=parts).num_bytes == BYTES[text]


specs = st.one_of(
    st.sampled_from([TransformSpec(kind=TransformKind.SCALE), TransformSpec(kind=TransformKind.PERMUTE)]),
    st.integers(0, 12).map(lambda power: TransformSpec(kind=TransformKind.HADAMARD, size=2**power)),
    st.builds(TransformSpec, kind=st.just(TransformKind.BLOCK), size=st.integers(1, 999), is_shared=st.booleans()),
    st.builds(
        TransformSpec, kind=st.just(TransformKind.KRONECKER), size=st.integers(1, 999), outer=st.integers(1, 999)
    ),
)


@given(spec=specs)
def test_words_go_there_and_back(spec: TransformSpec) -> None:
    assert parse_transform(str(spec)) == spec
    assert parse_transform(f"  {str(spec).replace(',', ' , ')} ") == spec, "spaces do not count"


FORMS = "must be scale, permute, hadamard(B), block(B), block(B,shared) or kronecker(A,B)"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", FORMS),
        ("turn(4)", FORMS),
        ("Scale", FORMS),
        ("block(a)", FORMS),
        ("block(-4)", FORMS),
        ("block(4", FORMS),
        ("block(32,shared,shared)", FORMS),
        ("hadamard", "hadamard takes 1 number, got 0"),
        ("block()", FORMS),
        ("kronecker(4)", "kronecker takes 2 numbers, got 1"),
        ("kronecker(4,4,4)", "kronecker takes 2 numbers, got 3"),
        ("scale(3)", "scale takes 0 numbers, got 1"),
        ("hadamard(12)", "a Hadamard block is a power of two, got 12"),
        ("hadamard(16,shared)", "only block transforms can be shared, not hadamard"),
        ("hadamard(0)", "transform hadamard cannot have the sizes (0, 0)"),
        ("kronecker(0,8)", "transform kronecker cannot have the sizes (0, 8)"),
    ],
)
def test_words_that_are_no_transform(text: str, problem: str) -> None:
    with pytest.raises(FormatError, match=re.escape(problem)):
        parse_transform(text)


@pytest.mark.parametrize(
    ("text", "cols", "reason"),
    [
        ("hadamard(16)", 40, "hadamard(16) needs a width that is a multiple of 16, got 40"),
        ("block(32,shared)", 33, "block(32,shared) needs a width that is a multiple of 32, got 33"),
        ("kronecker(4,8)", 64, "kronecker(4,8) acts on 32 columns, not on 64"),
        ("kronecker(4,8)", 32, None),
        ("scale", 7, None),
        ("hadamard(8)", 8, None),
    ],
)
def test_widths(text: str, cols: int, reason: str | None) -> None:
    spec = parse_transform(text)
    assert spec.refusal(cols) == reason
    if reason is not None:
        for ask in (spec.part_specs, spec.num_bytes):
            with pytest.raises(ShapeError, match=re.escape(reason)):
                ask(cols)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"scale": torch.ones(7)},
        {"scale": torch.ones(8, dtype=torch.float64)},
        {"order": torch.ones(8)},
        {"scale": torch.ones(8), "order": torch.ones(8)},
    ],
)
def test_parts_that_do_not_fit_the_words(parts: dict[str, Tensor]) -> None:
    with pytest.raises(ShapeError, match="transform scale of 8 columns has the parts"):
        Transform(spec=parse_transform("scale"), cols=8, parts=parts)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: scale_transform(torch.ones(8, dtype=torch.float64)), "scale"),
        (lambda: permute_transform(torch.tensor([2, 0, 1])), "permute"),
        (lambda: hadamard_transform(8, 4), "hadamard(4)"),
        (lambda: block_transform(torch.eye(4).repeat(2, 1, 1), 8), "block(4)"),
        (lambda: block_transform(torch.eye(4)[None], 8), "block(4,shared)"),
        (lambda: block_transform(torch.eye(8)[None], 8), "block(8)"),  # its one block is shared with none
        (lambda: kronecker_transform(torch.eye(2, dtype=torch.float64), torch.eye(4)), "kronecker(2,4)"),
    ],
)
def test_numbers_choose_the_words(make: Callable[[], Transform], text: str) -> None:
    transform = make()
    assert str(transform.spec) == text
    assert {part.dtype for part in transform.parts.values()} <= {torch.float32, torch.int32}
    assert all(part.is_contiguous() for part in transform.parts.values())


@pytest.mark.parametrize("order", [[0, 0], [1, 2], [-1, 0], [0, 2, 1, 1]])
def test_an_order_names_each_column_once(order: list[int]) -> None:
    with pytest.raises(ShapeError, match=f"an order of {len(order)} columns must name each of them once"):
        permute_transform(torch.tensor(order))
