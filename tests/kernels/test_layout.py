"""Which layout a weight goes into: that of the first backend that runs it there, and home is where it may stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from microscale.errors import ArgumentError, DtypeError, FormatError, LayoutError
from microscale.formats import Format, parse_format
from microscale.kernels import (
    Backend,
    Operation,
    Request,
    dispatch,
    is_at_home,
    preferred_layout,
    quantize,
    to_layout,
)
from microscale.kernels.layout import why_not_linear
from microscale.kernels.reference import BACKEND as REFERENCE
from microscale.layouts import LAYOUTS
from vectors.inputs import same_bits

CPU = torch.device("cpu")
WEIGHT = quantize(torch.ones(4, 32), "mxfp4")


def backend(
    name: str, wanted: str | None, why_not: Callable[[Request], str | None] = lambda request: None, owns: bool = True
) -> Backend:
    """A backend that wants a layout; it owns rows16 where asked."""

    def wanted_layout(fmt: Format, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
        return wanted if device == CPU else None

    return Backend(
        name=name,
        title=name,
        rank=1,
        implementations={Operation.LINEAR: lambda: None},
        why_not=why_not,
        layouts=(LAYOUTS["rows16"],) if owns else (),
        wanted_layout=wanted_layout,
    )


def refuses_rounding(request: Request) -> str | None:
    return None if request.activations is None else "keeps its inputs"


def test_the_first_willing_backend_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    never = backend("never", "rows16", lambda request: "not today")
    absent = dataclasses.replace(backend("absent", "rows16"), unavailable=lambda: "no GPU")
    picky = backend("picky", "rows16", refuses_rounding)
    monkeypatch.setattr(dispatch, "BACKENDS", [never, absent, backend("none", None), REFERENCE])
    assert preferred_layout(WEIGHT, torch.float32) == "row_major"
    monkeypatch.setattr(dispatch, "BACKENDS", [never, absent, picky, REFERENCE])
    assert preferred_layout(WEIGHT, torch.float32) == "rows16"
    assert preferred_layout(WEIGHT, torch.float32, activations=parse_format("mxfp8")) == "row_major"
    assert preferred_layout(WEIGHT, torch.float32, device=torch.device("meta")) == "row_major", "where it will be"


def test_reasons_are_those_in_the_layout_that_a_backend_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads_rows16(request: Request) -> str | None:
        return refuses_rounding(request) if request.layout == "rows16" else "reads rows16 only"

    wanting, absent = (
        backend("wanting", "rows16", reads_rows16),
        dataclasses.replace(backend("absent", "rows16"), unavailable=lambda: "no GPU"),
    )
    plain = dataclasses.replace(backend("plain", None, lambda request: "not today"))
    monkeypatch.setattr(dispatch, "BACKENDS", [wanting, absent, plain, REFERENCE])
    request = Request(operation=Operation.LINEAR, format=WEIGHT.format, device=CPU, dtype=torch.float32)
    others = {"absent": "no GPU", "plain": "not today", "reference": None}
    assert why_not_linear(request, WEIGHT.shape) == {"wanting": "reads rows16 only", **others}
    rounding = dataclasses.replace(request, activations=parse_format("mxfp8"))
    assert why_not_linear(rounding, WEIGHT.shape) == {"wanting": "keeps its inputs", **others}
    tiles = dataclasses.replace(rounding, format=parse_format("e4m3/16x16:fp32"))
    said = "e4m3/16x16:fp32:amax cannot be laid out as rows16: it needs blocks along the last axis, or one for each row"
    assert why_not_linear(tiles, (16, 16))["wanting"] == said


def test_a_layout_without_a_place_for_the_format_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", [backend("eager", "rows16"), REFERENCE])
    assert preferred_layout(quantize(torch.ones(16, 16), "e4m3/16x16:fp32"), torch.float32) == "row_major"


def test_home_is_row_major_or_where_the_owner_runs_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = parse_format("mxfp4")
    monkeypatch.setattr(dispatch, "BACKENDS", [REFERENCE])
    assert is_at_home("row_major", fmt, torch.float32, torch.device("meta"))
    assert not is_at_home("rows16", fmt, torch.float32, CPU), "its owner is gone"
    on_cpu = backend("owner", "rows16", lambda request: None if request.device == CPU else "lives on the CPU")
    monkeypatch.setattr(dispatch, "BACKENDS", [on_cpu, REFERENCE])
    assert is_at_home("rows16", fmt, torch.float32, CPU)
    assert not is_at_home("rows16", fmt, torch.float32, torch.device("meta"))
    monkeypatch.setattr(dispatch, "BACKENDS", [dataclasses.replace(on_cpu, layouts=()), REFERENCE])
    assert not is_at_home("rows16", fmt, torch.float32, CPU), "a guest may not stay"


def test_there_and_back_are_the_same_parts() -> None:
    tensor = quantize(torch.randn(5, 70, generator=torch.Generator().manual_seed(1)), "segments(mxfp4*32,mxfp8*38)")
    there = to_layout(tensor, "rows16")
    assert there.layout == "rows16" and to_layout(there, "rows16") is there
    back = to_layout(there, "row_major")
    assert set(back.parts) == set(tensor.parts)
    assert all(same_bits(part, tensor.parts[name]) for name, part in back.parts.items())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: to_layout(WEIGHT, "swizzled"), LayoutError, "swizzled"),
        (
            lambda: to_layout(cast("Any", WEIGHT.parts["codes"]), "rows16"),
            ArgumentError,
            "what is laid out must be a QuantizedTensor",
        ),
        (
            lambda: to_layout(quantize(torch.ones(16, 16), "e4m3/16x16:fp32"), "rows16"),
            LayoutError,
            "e4m3/16x16:fp32:amax cannot be laid out as rows16: it needs blocks along the last axis",
        ),
        (lambda: preferred_layout(WEIGHT, torch.int8), DtypeError, "dtype of the inputs must be a float dtype"),
        (
            lambda: preferred_layout(WEIGHT, torch.float32, activations=cast("Any", "mxfp8")),
            FormatError,
            "activations must be a format record or None, got 'mxfp8'",
        ),
        (
            lambda: preferred_layout(WEIGHT, torch.float32, device=cast("Any", "cpu")),
            ArgumentError,
            "the device must be a torch.device",
        ),
        (
            lambda: is_at_home(cast("Any", 7), WEIGHT.format, torch.float32, CPU),
            ArgumentError,
            "the layout must be the name",
        ),
        (
            lambda: is_at_home("rows16", cast("Any", "mxfp4"), torch.float32, CPU),
            FormatError,
            "the format must be a format record",
        ),
    ],
)
def test_what_is_refused(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
