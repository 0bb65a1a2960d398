"""What to do where no backend can run a request: which single fact of it stands in the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch

from microscale.formats import NAMED_FORMATS, parse_format
from microscale.formats.dtypes import FLOAT_DTYPES, dtype_name
from microscale.kernels.backend import Request
from microscale.layouts import LAYOUTS

SHOWN = 3
"""How many of the possible values a remedy names."""


def remedy(request: Request, is_accepted: Callable[[Request], bool]) -> str:
    """Return what a user can change so that the request is accepted; facts that alone would do are named, each.

    Values are tried: every float dtype, layout, device at hand and named format.
    """

    def accepted(**facts: object) -> bool:
        return is_accepted(dataclasses.replace(request, **facts))

    found: list[str] = []
    if request.records_gradient and accepted(records_gradient=False):
        found.append("call it inside torch.no_grad(), without a gradient")
    if request.activations is not None and accepted(activations=None):
        found.append("round the inputs beforehand (fake_quantize) and keep them")
    dtypes = [dtype for dtype in FLOAT_DTYPES if dtype != request.dtype and accepted(dtype=dtype)]
    if dtypes:
        found.append(f"cast to {_any_of(dtype_name(dtype) for dtype in dtypes)}")
    layouts = [name for name in LAYOUTS if name != request.layout and accepted(layout=name)]
    if layouts:
        found.append(f"use the layout {_any_of(layouts)}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    devices = [name for name in devices if name != request.device.type and accepted(device=torch.device(name))]
    if devices:
        found.append(f"move it to {_any_of(devices)}")
    if request.format is not None and not found:
        formats = (name for name in NAMED_FORMATS if accepted(format=parse_format(name)))
        names = [name for name, _ in zip(formats, range(SHOWN), strict=False)]
        found += [f"choose another format, such as {_any_of(names)}"] if names else []
    return "; or ".join(found) or "no change of one fact would do: see the reasons"


def _any_of(words: Iterable[str]) -> str:
    return " or ".join(list(words)[:SHOWN])
