"""The bitwise contract: every backend gives the bytes of tests/vectors/blocks.json, on the CPU and on CUDA.

A new backend needs no test of its own here: it is taken from ``kernels.dispatch.BACKENDS`` and run on every case that
it does not refuse.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from format_specs import parts_of
from microscale.formats import NAMED_FORMATS, Extension, Rounding, RuleKind, parse_format
from microscale.kernels import dequantize, fake_quantize, quantize
from microscale.kernels.dispatch import BACKENDS, Backend, Operation, Request
from microscale.tensor import QuantizedTensor
from vectors.inputs import same_bits
from vectors.make_blocks import DTYPES, PATH, cases, from_hex, inputs

FILE = json.loads(PATH.read_text())
CASES = {row["name"]: row for row in FILE["cases"]}
INPUTS = {name: from_hex(row["hex"], row["dtype"], row["shape"]) for name, row in FILE["inputs"].items()}


def expected_parts(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: from_hex(part["hex"], part["dtype"], part["shape"]) for name, part in row["parts"].items()}


def skip_if_refused(backend: Backend, operation: Operation, row: dict[str, Any], device: torch.device) -> None:
    request = Request(
        operation=operation,
        format=parse_format(row["format"]),
        device=device,
        dtype=INPUTS[row["input"]].dtype,
        layout="row_major",
    )
    refusal = backend.refusal(request)
    if refusal is not None:
        pytest.skip(f"{backend.name}: {refusal}")


def check(backend: Backend, name: str, device: torch.device) -> None:
    row = CASES[name]
    values = INPUTS[row["input"]]
    fmt = parse_format(row["format"])
    parts = expected_parts(row)
    restored = from_hex(row["values"], str(values.dtype).removeprefix("torch."), list(values.shape))
    amax = None if "amax" not in row else torch.tensor(row["amax"], device=device)
    skip_if_refused(backend, Operation.QUANTIZE, row, device)
    packed = backend.implementations[Operation.QUANTIZE](values.to(device), fmt, amax=amax, name="the tensor")
    assert set(packed.parts) == set(parts)
    for part in parts:
        got = packed.parts[part].cpu()
        assert same_bits(got, parts[part]), f"{part}: {got.flatten()} is not {parts[part].flatten()}"
    stored = QuantizedTensor(
        format=fmt, shape=tuple(values.shape), dtype=values.dtype, parts={k: p.to(device) for k, p in parts.items()}
    )
    skip_if_refused(backend, Operation.DEQUANTIZE, row, device)
    assert same_bits(backend.implementations[Operation.DEQUANTIZE](stored, None).cpu(), restored)
    skip_if_refused(backend, Operation.FAKE_QUANTIZE, row, device)
    faked = backend.implementations[Operation.FAKE_QUANTIZE](values.to(device), fmt, amax=amax, name="the tensor")
    assert same_bits(faked.cpu(), restored)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_bytes_on_the_cpu(backend: Backend, name: str) -> None:
    check(backend, name, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_bytes_on_cuda(backend: Backend, name: str) -> None:
    check(backend, name, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec", [*NAMED_FORMATS, "mxfp4:stochastic(3)", "e4m3/128x128:fp32", "mxfp4_plus+sparse1%:fp16"]
)
def test_large_tensors_give_the_same_bits_on_cuda(spec: str) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(257, 1056, generator=generator)
    values *= torch.exp2(torch.randint(-30, 30, (257, 1), generator=generator).float())
    here, there = quantize(values, spec), quantize(values.cuda(), spec)
    for name, part in here.parts.items():
        assert same_bits(there.parts[name].cpu(), part), name
    assert same_bits(dequantize(there).cpu(), dequantize(here))
    assert same_bits(fake_quantize(values.cuda(), spec).cpu(), fake_quantize(values, spec))


# ------------------------------------------------------------------------------------------------ the file itself


def test_the_file_has_the_inputs_and_cases_of_its_generator() -> None:
    made = inputs()
    assert all(same_bits(made[name], values) for name, values in INPUTS.items()) and set(made) == set(INPUTS)
    assert [case.name for case in cases()] == list(CASES)
    assert len(CASES) == len(FILE["cases"]), "names are unique"


def test_the_file_covers_the_formats() -> None:
    seen: set[object] = set()
    by_input: dict[str, set[str]] = {}
    for row in FILE["cases"]:
        fmt = parse_format(row["format"])
        by_input.setdefault(row["input"], set()).add(row["format"])
        seen.add(fmt.sparse.element if fmt.sparse else None)
        for part in parts_of(fmt):
            seen |= {part.rule.kind, part.extension, part.rounding, part.zero_point, part.overflow, part.inf_policy}
            seen |= {type(part.block).__name__, part.sub_scale.kind if part.sub_scale else None}
    for options in (RuleKind, Extension, Rounding):
        assert set(options) <= seen
    assert {"VectorBlock", "TileBlock", "ChannelBlock", "TensorBlock"} <= seen
    for name in ("ordinary", "edges", "special"):
        assert set(NAMED_FORMATS) <= by_input[name]
    assert {row["dtype"] for row in FILE["inputs"].values()} == {"float32", "bfloat16", "float16"}
    assert set(DTYPES) >= {part["dtype"] for row in FILE["cases"] for part in row["parts"].values()}
