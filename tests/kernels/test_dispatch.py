"""The dispatcher: the first backend without a refusal runs; every refusal is explained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from microscale.errors import KernelError, LayoutError
from microscale.formats import NAMED_FORMATS, parse_format
from microscale.kernels import Operation, Request, dequantize, dispatch, fake_quantize, linear, quantize, why_not
from microscale.kernels.backend import Backend
from microscale.kernels.dispatch import BACKENDS, choose
from microscale.kernels.reference import BACKEND as REFERENCE
from microscale.tensor import QuantizedTensor


def request(operation: Operation = Operation.QUANTIZE, layout: str = "row_major", spec: str = "mxfp4") -> Request:
    return Request(
        operation=operation,
        format=parse_format(spec),
        device=torch.device("cpu"),
        dtype=torch.float32,
        layout=layout,
    )


def test_the_reference_backend_stands_last_and_takes_every_operation_and_format() -> None:
    assert BACKENDS[-1] is REFERENCE
    assert set(REFERENCE.implementations) == set(Operation)
    for name in NAMED_FORMATS:
        for operation in Operation:
            assert REFERENCE.refusal(request(operation, spec=name)) is None
    assert len({backend.name for backend in BACKENDS}) == len(BACKENDS)


def test_why_not_lists_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    partial = Backend(name="partial", title="partial", rank=1, implementations={}, why_not=lambda _: None)
    picky = Backend(
        name="picky",
        title="picky",
        rank=1,
        implementations=REFERENCE.implementations,
        why_not=lambda r: f"not for {r.dtype}",
    )
    monkeypatch.setattr(dispatch, "BACKENDS", [partial, picky, REFERENCE])
    assert why_not(request(Operation.LINEAR)) == {
        "partial": "does not implement linear",
        "picky": "not for torch.float32",
        "reference": None,
    }
    assert choose(request()) is REFERENCE


def test_an_unknown_layout_is_refused_with_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    partial = Backend(name="partial", title="partial", rank=1, implementations={}, why_not=lambda _: None)
    monkeypatch.setattr(dispatch, "BACKENDS", [partial, REFERENCE])
    with pytest.raises(KernelError) as caught:
        choose(request(Operation.DEQUANTIZE, layout="swizzled"))
    text = str(caught.value)
    assert "dequantize of mxfp4 (torch.float32, cpu, layout swizzled)" in text
    assert "partial: does not implement dequantize" in text
    assert "reference: knows the layouts row_major, rows16, not swizzled" in text
    assert text.endswith("use the layout row_major or rows16")
    packed = quantize(torch.ones(2, 32), "mxfp4")
    with pytest.raises(LayoutError, match="swizzled"):
        QuantizedTensor(
            format=packed.format, shape=packed.shape, dtype=packed.dtype, parts=packed.parts, layout="swizzled"
        )


def test_every_operation_goes_through_the_first_willing_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Operation, tuple[Any, ...]]] = []

    answers = {operation: torch.zeros(2, 32) for operation in Operation}

    def recorder(operation: Operation) -> Any:
        def run(*args: Any, **keywords: Any) -> torch.Tensor:
            calls.append((operation, args))
            return answers[operation]

        return run

    spy = Backend(
        name="spy", title="spy", rank=1, implementations={op: recorder(op) for op in Operation}, why_not=lambda _: None
    )
    packed = quantize(torch.ones(2, 32), "mxfp4")
    monkeypatch.setattr(dispatch, "BACKENDS", [spy, REFERENCE])
    values = torch.ones(2, 32)
    assert quantize(values, "mxfp4") is answers[Operation.QUANTIZE]
    assert fake_quantize(values, parse_format("mxfp4")) is answers[Operation.FAKE_QUANTIZE]
    assert dequantize(packed, torch.float16) is answers[Operation.DEQUANTIZE]
    assert linear(torch.ones(1, 32), packed) is answers[Operation.LINEAR]
    assert [operation for operation, _ in calls] == [
        Operation.QUANTIZE,
        Operation.FAKE_QUANTIZE,
        Operation.DEQUANTIZE,
        Operation.LINEAR,
    ]
    assert calls[0][1][1] == parse_format("mxfp4"), "a spec arrives as a record"
