"""The product under test as the benchmarks call it: a prepared linear layer, and what it could not prepare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from microscale.errors import LayoutError, MicroscaleError
from microscale.formats import SegmentedFormat, parse_format
from microscale.kernels import quantize, to_layout
from microscale.kernels.cpu.linear import prepare_linear, prepare_segments
from microscale.tensor import QuantizedTensor

DISTINCT_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One layer, ready to run: ``run(inputs, out)``, and the packed bytes that a run reads."""

    run: Callable[[Tensor, Tensor], None]
    num_bytes: int


def random_weight(fmt: str, rows: int, cols: int) -> QuantizedTensor:
    """Quantize a random weight and pack it for the kernels; rows repeat, which no kernel can make use of."""
    values = torch.randn(min(rows, DISTINCT_ROWS), cols, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = quantize(values, parse_format(fmt))
    repeated = packed.select_rows(torch.arange(rows) % values.shape[0])
    if repeated is None:  # a sparse table or a pair of formats belongs to the whole tensor
        repeated = quantize(values.repeat(-(-rows // values.shape[0]), 1)[:rows].contiguous(), parse_format(fmt))
    try:
        return to_layout(repeated, "rows16")
    except LayoutError:
        return repeated


def copy_weight(weight: QuantizedTensor) -> QuantizedTensor:
    """Return the same weight in memory of its own."""
    parts = {name: part.clone() for name, part in weight.parts.items()}
    return QuantizedTensor(
        format=weight.format, shape=weight.shape, dtype=weight.dtype, parts=parts, layout=weight.layout
    )


def prepare(weight: QuantizedTensor, activations: str | None) -> Prepared | str:
    """Prepare one layer without bias, or say why the kernels do not take it."""
    inputs = None if activations is None else parse_format(activations)
    try:
        if isinstance(weight.format, SegmentedFormat):
            call = prepare_segments(weight, inputs)
        else:
            call = prepare_linear([weight], [None], inputs)
    except MicroscaleError as error:
        return str(error).partition("\n")[0]
    return Prepared(run=call.run, num_bytes=call.num_bytes)
