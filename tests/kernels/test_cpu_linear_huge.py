"""linear on tensors of more than 2^31 elements: weights, inputs and outputs whose offsets fit into no 32 bits.

Random codes stand for a quantized weight, so that its numbers are never all there at once; what is compared are the
outputs of the groups of rows, or of the columns, on both sides of an offset of 2^31 and 2^32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bounds import exact_linear, linear_bound
from microscale.formats import BlockFormat, parse_format
from microscale.kernels import dequantize, fake_quantize, linear, to_layout
from microscale.kernels.cpu import native
from microscale.layouts import LAYOUTS
from microscale.tensor import QuantizedTensor

fcntl = pytest.importorskip("fcntl", reason="needs the locks and the /proc of Linux")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.NATIVE is None, reason="the compiled kernels are not installed"),
]

ROWS = 16
"""Rows that the layout rows16 sets side by side: one group."""
INT8 = "int8/32:fp32:amax"


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One of these tests at a time, however many workers there are: what they need would add up."""
    with (tmp_path_factory.getbasetemp().parent / "huge.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def need_gib(gib: int) -> None:
    """Skip where less memory is free; where the system does not say, it is taken for too little."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = next((int(line.split()[1]) >> 20 for line in lines if line.startswith("MemAvailable:")), 0)
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free memory, and there are {free}")


def memory_in_use() -> int:
    """Bytes of this process that are in memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def random_weight(spec: str, rows: int, cols: int) -> QuantizedTensor:
    """Random codes of a format with scales about 1, in row_major and then in rows16."""
    fmt = parse_format(spec)
    generator = torch.Generator().manual_seed(rows)
    parts: dict[str, Tensor] = {}
    for name, part in LAYOUTS["row_major"].part_specs(fmt, (rows, cols)).items():
        count = part.num_bytes
        data = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**62), 2**62, generator=generator)
        parts[name] = data.view(torch.uint8)[:count].view(part.dtype).view(part.shape)
    parts["scale"].remainder_(8).add_(124)  # codes of E8M0: 2^-3 to 2^4
    if spec == "mxfp8":
        parts["codes"].bitwise_and_(0xF7)  # no NaN
    row_major = QuantizedTensor(format=fmt, shape=(rows, cols), dtype=torch.float32, parts=parts)
    return to_layout(row_major, "rows16")


def cut(weight: QuantizedTensor, groups: slice, chunks: slice = slice(None)) -> Tensor:
    """The numbers of some groups of 16 rows and chunks of 32 columns of a weight in blocks of 32."""
    parts = {name: part[groups, chunks].contiguous() for name, part in weight.parts.items()}
    shape = (parts["codes"].shape[0] * ROWS, parts["codes"].shape[1] * 32)
    piece = QuantizedTensor(format=weight.format, shape=shape, dtype=torch.float32, parts=parts, layout=weight.layout)
    return dequantize(to_layout(piece, "row_major"))


def crossings(weight: QuantizedTensor, size: int) -> list[int]:
    """Where in steps of ``size`` codes an element, and where a byte, of the parts has the offset 2^31 or 2^32."""
    assert isinstance(weight.format, BlockFormat)
    bits = weight.format.element.bits
    offsets = [2**31, 2**32, 2**31 * 8 // bits, 2**32 * 8 // bits]
    last = weight.rows * weight.cols // size - 1
    return sorted({place for offset in offsets for place in (offset // size - 1, offset // size) if place <= last})


@pytest.mark.parametrize(("spec", "gib"), [("mxfp4", 6), ("mxfp8", 11)])
def test_many_rows_of_a_weight(spec: str, gib: int) -> None:
    """2^32 elements and one group of rows more: 2.1 GB of 4-bit codes, 4.3 GB of 8-bit ones."""
    need_gib(gib)
    cols = 4096
    rows = 2**32 // cols + 2 * ROWS
    weight = random_weight(spec, rows, cols)
    places = [0, *crossings(weight, ROWS * cols), rows // ROWS - 1]
    assert len(places) == 6
    inputs = torch.randn(3, cols, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-1, 1, rows)
    for count, activations in ((1, None), (3, None), (1, INT8), (3, INT8), (1, "mxfp8")):
        used = inputs[:count] if activations is None else fake_quantize(inputs[:count], activations)
        got = linear(inputs[:count], weight, bias, activations=activations)
        assert got.shape == (count, rows)
        for group in places:
            here = slice(group * ROWS, (group + 1) * ROWS)
            values = cut(weight, slice(group, group + 1))
            error = (got[:, here].double() - exact_linear(used, values, bias[here])).abs()
            bound = linear_bound(used, values, weight.format, bias[here])
            assert bool((error <= bound).all()), (group, activations)


def test_wide_rows_of_a_weight() -> None:
    """16 rows of 2^28 columns and some: inputs are zero but for the columns about an offset, and integers there."""
    need_gib(10)
    cols = 2**28 + 64
    weight = random_weight("mxfp4", ROWS, cols)
    chunks = [0, *crossings(weight, ROWS * 32), cols // 32 - 1]
    assert len(chunks) == 6
    inputs = torch.zeros(1, cols)
    expected = torch.zeros(1, ROWS, dtype=torch.float64)
    for place in chunks:
        own = torch.arange(1, 33).view(1, 32).float() * (-1) ** place
        inputs[:, 32 * place : 32 * (place + 1)] = own
        expected += exact_linear(own, cut(weight, slice(None), slice(place, place + 1)))
    assert torch.equal(linear(inputs, weight).double(), expected)  # small integers times powers of two: no rounding
    rounded, bound = torch.zeros_like(expected), torch.zeros_like(expected)
    for place in chunks:
        own = fake_quantize(inputs[:, 32 * place : 32 * (place + 1)].contiguous(), INT8)
        values = cut(weight, slice(None), slice(place, place + 1))
        rounded += exact_linear(own, values)
        bound += linear_bound(own, values, weight.format)
    assert bool(((linear(inputs, weight, activations=INT8).double() - rounded).abs() <= bound).all())


@pytest.mark.parametrize("activations", [None, INT8, "nvfp4", "mxfp8"])
def test_many_rows_of_inputs(activations: str | None) -> None:
    """2^31 numbers and some as inputs; rounding them to mxfp8 takes as much memory again."""
    need_gib(11)
    cols, small = 1024, 2**12
    rows = 2**31 // cols + 5
    weight = random_weight("mxfp4", ROWS, cols)
    inputs = torch.zeros(rows, cols, dtype=torch.bfloat16)
    piece = torch.randn(small, cols, generator=torch.Generator().manual_seed(2)).bfloat16()
    inputs[:small], inputs[-small:] = piece / 2, piece  # the largest number of all, a scale of nvfp4, is near the end
    got = linear(inputs, weight, activations=activations)
    assert got.shape == (rows, ROWS) and not bool(got[small:-small].any())
    expected = linear(torch.cat([piece / 2, piece]), weight, activations=activations)
    assert torch.equal(got[:small], expected[:small]) and torch.equal(got[-small:], expected[small:])
    kept = memory_in_use() - inputs.numel() * inputs.element_size()
    assert kept < 2**31, f"{kept >> 20} MiB are kept beside the inputs"  # a rounded copy is not


def test_many_numbers_of_outputs() -> None:
    """2^31 outputs and some: the rows beyond that are those of a small call."""
    need_gib(7)
    cols, columns, small = 32, 1024, 2**12
    rows = 2**31 // columns + 5
    weight = random_weight("mxfp4", columns, cols)
    inputs = torch.zeros(rows, cols, dtype=torch.bfloat16)
    piece = torch.randn(small, cols, generator=torch.Generator().manual_seed(2)).bfloat16()
    inputs[:small], inputs[-small:] = piece / 2, piece
    got = linear(inputs, weight)
    assert got.shape == (rows, columns) and not bool(got[small:-small].any())
    assert torch.equal(got[:small], linear(piece / 2, weight)) and torch.equal(got[-small:], linear(piece, weight))
