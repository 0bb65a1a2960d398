"""The record of a backend, and of what it is asked: the order of its reasons, and requests in words."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from microscale.formats import parse_format
from microscale.kernels import Backend, Operation, Request
from microscale.kernels.backend import Call, StepKind

REQUEST = Request(
    operation=Operation.LINEAR,
    format=parse_format("e2m1/32:e8m0"),
    device=torch.device("cpu"),
    dtype=torch.bfloat16,
    layout="rows16",
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "linear of mxfp4 (torch.bfloat16, cpu, layout rows16)"),
        (
            {"operation": Operation.TO_LAYOUT, "target": "row_major"},
            "to_layout of mxfp4 (torch.bfloat16, cpu, layout rows16 to row_major)",
        ),
        (
            {"operation": Operation.RMS_NORM, "format": None, "device": torch.device("cuda", 1)},
            "rms_norm (torch.bfloat16, cuda:1, layout rows16)",
        ),
    ],
)
def test_a_request_in_words(changes: dict[str, object], words: str) -> None:
    assert str(dataclasses.replace(REQUEST, **changes)) == words


def test_reasons_come_from_the_general_to_the_particular() -> None:
    """Not implemented; not on this machine; not this request."""
    reasons: dict[str, str | None] = {"machine": "needs a GPU", "request": "takes no linear"}
    backend = Backend(
        name="toy",
        title="toy",
        rank=1,
        implementations={Operation.LINEAR: lambda: None},
        why_not=lambda request: reasons["request"],
        unavailable=lambda: reasons["machine"],
    )
    assert backend.refusal(dataclasses.replace(REQUEST, operation=Operation.QUANTIZE)) == "does not implement quantize"
    assert backend.refusal(REQUEST) == "needs a GPU"
    reasons["machine"] = None
    assert backend.refusal(REQUEST) == "takes no linear"
    reasons["request"] = None
    assert backend.refusal(REQUEST) is None


def test_a_backend_that_says_little_wants_no_layout_and_has_no_level() -> None:
    plain = Backend(name="toy", title="toy", rank=1, implementations={}, why_not=lambda request: None)
    assert plain.wanted_layout(parse_format("mxfp4"), (2, 32), torch.float32, torch.device("cpu")) is None
    assert (plain.unavailable(), plain.level(), plain.advice(), plain.layouts, plain.bind) == (
        None,
        None,
        None,
        (),
        None,
    )


def test_a_call_is_the_operation_of_its_first_part() -> None:
    parts = (REQUEST, dataclasses.replace(REQUEST, layout="row_major"))
    assert Call(kind=StepKind.LINEAR, requests=parts, arguments=()).operation is Operation.LINEAR
