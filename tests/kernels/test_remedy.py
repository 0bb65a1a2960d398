"""The closing advice of a refusal names the fact of the request that stands in the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from microscale.errors import KernelError
from microscale.formats import parse_format
from microscale.kernels import Backend, Operation, Request, dispatch
from microscale.kernels.dispatch import choose

ASKED = Request(
    operation=Operation.LINEAR,
    format=parse_format("mxfp4"),
    device=torch.device("cpu"),
    dtype=torch.float32,
    layout="row_major",
)


def takes(accepts: Callable[[Request], bool]) -> Backend:
    return Backend(
        name="picky",
        title="picky",
        rank=1,
        implementations={Operation.LINEAR: lambda: None},
        why_not=lambda request: None if accepts(request) else "not this",
    )


@pytest.mark.parametrize(
    ("changes", "accepts", "advice"),
    [
        ({"dtype": torch.float64}, lambda r: r.dtype != torch.float64, "cast to float32 or bfloat16 or float16"),
        ({"dtype": torch.int8}, lambda r: r.dtype == torch.bfloat16, "cast to bfloat16"),
        ({"device": torch.device("meta")}, lambda r: r.device.type == "cpu", "move it to cpu"),
        ({"layout": "swizzled"}, lambda r: r.layout == "rows16", "use the layout rows16"),
        ({}, lambda r: r.format == parse_format("mxfp8"), "choose another format, such as mxfp8"),
        ({"activations": parse_format("nvfp4")}, lambda r: r.activations is None, "round the inputs beforehand"),
        ({"records_gradient": True}, lambda r: not r.records_gradient, "call it inside torch.no_grad()"),
        ({}, lambda r: False, "no change of one fact would do"),
        (
            {"dtype": torch.float64, "layout": "swizzled"},
            lambda r: r.dtype == torch.float32 and r.layout == "rows16",
            "no change of one fact would do",
        ),
        ({}, lambda r: r.dtype == torch.float16 or r.layout == "rows16", "cast to float16; or use the layout rows16"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_advice_names_what_stands_in_the_way(
    changes: dict[str, object], accepts: Callable[[Request], bool], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", [takes(accepts)])
    with pytest.raises(KernelError) as caught:
        choose(dataclasses.replace(ASKED, **changes))
    assert str(caught.value).splitlines()[-1].startswith(advice)
    assert "picky: not this" in str(caught.value)
