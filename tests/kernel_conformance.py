"""What every backend must do: each operation that it does not refuse gives the result that its contract defines.

:func:`check` asks a backend for its refusal and runs it; a backend that is added later, by a folder or by a test, needs
no case of its own. Weights are tried in every layout there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from bounds import EPSILON, exact_linear, linear_bound
from microscale.formats import format_name, parse_format
from microscale.kernels import Backend, Operation, Request, to_layout
from microscale.kernels.reference import BACKEND as REFERENCE
from microscale.layouts import LAYOUTS, find_layout
from microscale.tensor import QuantizedTensor
from vectors.inputs import same_bits

SPECS = ("mxfp4", "mxfp6_e3m2", "mxfp8", "nvfp4", "mxfp4_plus", "int4_asym", "int8/channel:fp32", "e4m3/16x16:fp32")
DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")
ROWS, COLS = 33, 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An operation on a format and a dtype; ``activations`` are those of linear."""

    operation: Operation
    spec: str
    dtype: torch.dtype
    activations: str | None = None

    def __str__(self) -> str:
        words = (self.operation.value, self.spec, str(self.dtype).removeprefix("torch."), self.activations)
        return "-".join(filter(None, words))

    def request(self, layout: str = "row_major", target: str | None = None) -> Request:
        """Return what a backend is asked."""
        return Request(
            operation=self.operation,
            format=parse_format(self.spec),
            device=CPU,
            dtype=self.dtype,
            layout=layout,
            activations=None if self.activations is None else parse_format(self.activations),
            target=target,
        )


def _cases() -> list[Case]:
    kinds = (Operation.QUANTIZE, Operation.DEQUANTIZE, Operation.FAKE_QUANTIZE, Operation.TO_LAYOUT, Operation.LINEAR)
    found = [Case(operation=each, spec=spec, dtype=dtype) for each, spec, dtype in product(kinds, SPECS, DTYPES)]
    rounded = product(SPECS, DTYPES, ("mxfp8", "int8/32:fp32:amax"))
    linear = Operation.LINEAR
    found += [Case(operation=linear, spec=spec, dtype=dtype, activations=word) for spec, dtype, word in rounded]
    return found


CASES = _cases()


def numbers(rows: int, cols: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-6, 6, (rows, 1), generator=generator).float())
    return (torch.randn(rows, cols, generator=generator) * spread).to(dtype)


def check(backend: Backend, case: Case) -> int:
    """Run a case in every layout that the backend takes; returns how many it did."""
    values = numbers(ROWS, COLS, case.dtype, seed=1)
    fmt = parse_format(case.spec)
    stored: QuantizedTensor = REFERENCE.implementations[Operation.QUANTIZE](values, fmt)
    if case.operation in (Operation.QUANTIZE, Operation.FAKE_QUANTIZE):
        return _check_rounding(backend, case, values)
    done = 0
    for layout in LAYOUTS:
        if find_layout(layout).refusal(fmt, stored.shape) is not None:
            continue
        if case.operation is Operation.TO_LAYOUT:
            done += _check_packing(backend, case, stored, layout)
        elif backend.refusal(case.request(layout)) is None:
            done += 1
            laid_out = to_layout(stored, layout)
            run = backend.implementations[case.operation]
            if case.operation is Operation.DEQUANTIZE:
                expected = REFERENCE.implementations[Operation.DEQUANTIZE](stored, case.dtype)
                assert same_bits(run(laid_out, case.dtype, None), expected)
            else:
                _check_linear(run, case, laid_out, stored)
    return done


def _check_rounding(backend: Backend, case: Case, values: Tensor) -> int:
    if backend.refusal(case.request()) is not None:
        return 0
    fmt = parse_format(case.spec)
    got, expected = (each.implementations[case.operation](values, fmt) for each in (backend, REFERENCE))
    if isinstance(got, QuantizedTensor):
        assert set(got.parts) == set(expected.parts)
        assert all(same_bits(part, expected.parts[name]) for name, part in got.parts.items())
    else:
        assert same_bits(got, expected)
    return 1


def _check_packing(backend: Backend, case: Case, stored: QuantizedTensor, layout: str) -> int:
    done = 0
    there = find_layout(layout).pack(stored.parts, stored.format, stored.shape)
    laid_out = QuantizedTensor(format=stored.format, shape=stored.shape, dtype=stored.dtype, parts=there, layout=layout)
    for tensor, wanted in ((stored, laid_out), (laid_out, stored)):
        if backend.refusal(case.request(tensor.layout, wanted.layout)) is None:
            got = backend.implementations[Operation.TO_LAYOUT](tensor, wanted.layout)
            assert set(got.parts) == set(wanted.parts) and got.layout == wanted.layout
            assert all(same_bits(part, wanted.parts[name]) for name, part in got.parts.items())
            done += 1
    return done


def _check_linear(run: Callable[..., Tensor], case: Case, laid_out: QuantizedTensor, stored: QuantizedTensor) -> None:
    inputs, bias = numbers(5, COLS, case.dtype, seed=2), numbers(1, ROWS, case.dtype, seed=3)[0]
    record = None if case.activations is None else parse_format(case.activations)
    used = inputs
    if record is not None:
        used = REFERENCE.implementations[Operation.FAKE_QUANTIZE](inputs.float(), record)
    weight = REFERENCE.implementations[Operation.DEQUANTIZE](stored, torch.float32)
    bound = linear_bound(used, weight, stored.format, bias, dtype=case.dtype)
    if case.dtype != torch.float32:  # weights and rounded inputs may be cast to the dtype first
        bound = bound + 3 * EPSILON[case.dtype] * (used.double().abs() @ weight.double().abs().T)
    got = run(inputs, laid_out, bias, record)
    assert got.dtype == case.dtype
    error = (got.double() - exact_linear(used, weight, bias)).abs()
    assert bool((error <= bound).all()), f"{format_name(stored.format)}: {float((error / bound).max())} times the bound"
