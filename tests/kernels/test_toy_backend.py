"""A backend that is added from outside, by its record alone: own layout, two operations, preferred, and gone again.

Nothing else in the house knows it. This is what a new backend has to bring, and all that it has to bring.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import microscale
from kernel_conformance import CASES, Case, check
from microscale.errors import KernelError, LayoutError
from microscale.formats import BlockFormat, Format, VectorBlock
from microscale.kernels import (
    BACKENDS,
    Backend,
    Operation,
    Request,
    add_backend,
    count_executions,
    dequantize,
    preferred_layout,
    quantize,
    remove_backend,
    to_layout,
)
from microscale.kernels.reference import BACKEND as REFERENCE
from microscale.layouts import LAYOUTS, Layout, PartSpec, part_specs
from microscale.nn.packed import PackedModule
from microscale.tensor import QuantizedTensor
from small_models import logits, read_tensors, same_bits, same_tensors, save_random_model

COLUMNS = "columns_first"
"""Every part of two axes lies transposed."""


def specs(fmt: Format, shape: tuple[int, ...]) -> dict[str, PartSpec]:
    rows = part_specs(fmt, shape).items()
    return {name: dataclasses.replace(spec, shape=tuple(reversed(spec.shape))) for name, spec in rows}


def refusal(fmt: Format, shape: tuple[int, ...]) -> str | None:
    del shape
    is_plain = isinstance(fmt, BlockFormat) and isinstance(fmt.block, VectorBlock) and fmt.sparse is None
    return None if is_plain else "it holds blocks along the last axis alone"


def turn(parts: Mapping[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> dict[str, Tensor]:
    del fmt, shape
    return {name: part.T.contiguous() if part.dim() == 2 else part for name, part in parts.items()}


def toy_dequantize(tensor: QuantizedTensor, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    rows = turn(tensor.parts, tensor.format, tensor.shape)
    plain = QuantizedTensor(format=tensor.format, shape=tensor.shape, dtype=tensor.dtype, parts=rows)
    return REFERENCE.implementations[Operation.DEQUANTIZE](plain, dtype, out)


def toy_linear(inputs: Tensor, weight: QuantizedTensor, bias: Tensor | None, activations: Format | None) -> Tensor:
    assert activations is None
    product = inputs.double() @ toy_dequantize(weight, torch.float32).double().T
    return (product if bias is None else product + bias.double()).to(inputs.dtype)


def why_not(request: Request) -> str | None:
    if request.device.type != "cpu":
        return "lives on the CPU"
    if request.activations is not None:
        return "keeps its inputs as they are"
    if request.records_gradient:
        return "records no gradients"
    return None if request.layout == COLUMNS else f"reads {COLUMNS}, not {request.layout}"


TOY = Backend(
    name="toy",
    title="toy kernels",
    rank=1,
    implementations={Operation.LINEAR: toy_linear, Operation.DEQUANTIZE: toy_dequantize},
    why_not=why_not,
    layouts=(Layout(name=COLUMNS, part_specs=specs, refusal=refusal, pack=turn, unpack=turn),),
    wanted_layout=lambda fmt, shape, dtype, device: COLUMNS if device.type == "cpu" else None,
    level=lambda: "toy level 7",
)


@pytest.fixture
def toy() -> Generator[Backend, None, None]:
    add_backend(TOY)
    yield TOY
    remove_backend("toy")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.operation in TOY.implementations and not case.activations], ids=str
)
def test_it_passes_the_conformance_tests(toy: Backend, case: Case) -> None:
    if not check(toy, case):
        pytest.skip("the layout has no place for the format")


@pytest.mark.parametrize("case", [case for case in CASES if case.operation is not Operation.QUANTIZE], ids=str)
def test_the_others_read_its_layout_or_refuse_it(toy: Backend, case: Case) -> None:
    del toy
    assert check(REFERENCE, case)
    for backend in BACKENDS:
        check(backend, case)


def test_it_comes_and_goes_whole(toy: Backend) -> None:
    assert BACKENDS[0] is toy and COLUMNS in LAYOUTS
    packed = quantize(torch.randn(8, 64), "mxfp4")
    assert preferred_layout(packed, torch.float32) == COLUMNS
    assert preferred_layout(packed, torch.float32, device=torch.device("meta")) == "row_major"
    turned = to_layout(packed, COLUMNS)
    with count_executions() as counts:
        assert same_bits(dequantize(turned), dequantize(packed))
    assert counts[Operation.DEQUANTIZE, "toy"] == 1
    with pytest.raises(KernelError, match="'toy' already"):
        add_backend(TOY)
    remove_backend("toy")
    try:
        assert TOY not in BACKENDS and COLUMNS not in LAYOUTS
        with pytest.raises(KernelError, match="no backend 'toy'"):
            remove_backend("toy")
        with pytest.raises(LayoutError, match=COLUMNS):
            to_layout(packed, COLUMNS)
    finally:
        add_backend(TOY)


def test_a_model_runs_on_it_saves_the_same_bytes_and_leaves_it_on_a_move(toy: Backend, tmp_path: Path) -> None:
    remove_backend("toy")
    source = save_random_model(tmp_path / "source")
    try:
        microscale.save(microscale.quantize(source, "mxfp4"), tmp_path / "without", layout="microscale")
    finally:
        add_backend(toy)
    model = microscale.quantize(source, "mxfp4")
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    assert {module.layout for module in packed} == {COLUMNS}
    with count_executions() as counts:
        before = logits(model)
    assert counts == {(Operation.LINEAR, "toy"): len(packed)}
    microscale.save(model, tmp_path / "with", layout="microscale")
    assert same_tensors(read_tensors(tmp_path / "without"), read_tensors(tmp_path / "with")) == []
    loaded = microscale.load(tmp_path / "with")
    assert same_bits(logits(loaded), before)
    loaded.to("meta")
    assert {module.layout for module in loaded.modules() if isinstance(module, PackedModule)} == {"row_major"}
