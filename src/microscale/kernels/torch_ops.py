"""torch.library operators, so that torch.compile and torch.export see one node instead of our Python.

``microscale::fake_quantize``, ``microscale::dequantize`` and ``microscale::linear`` run the operation of the same name
through the dispatcher, on any device. Formats travel as their spec, so that an exported program lives on in another
process, where each spec is resolved to its record once; packed tensors travel as a list of parts with their names.
Eager code does not pass here: the operators cost more than a small kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.formats import Draw, Format, format_name, parse_format
from microscale.kernels.backend import Operation, Request
from microscale.kernels.dispatch import execute
from microscale.tensor import QuantizedTensor


@functools.cache
def _resolved(spec: str) -> Format:
    return parse_format(spec)


@torch.library.custom_op(
    "microscale::fake_quantize",
    mutates_args=(),
    schema="(Tensor values, str format, Tensor? amax, SymInt[]? draw, str name) -> Tensor",
)
def fake_quantize_operator(
    values: Tensor, format: str, amax: Tensor | None, draw: Sequence[int] | None, name: str
) -> Tensor:
    """Run fake_quantize; the result never shares memory with an argument."""
    record = _resolved(format)
    drawn = None if draw is None else Draw(seed=draw[0], step=draw[1], place=draw[2])
    request = Request(operation=Operation.FAKE_QUANTIZE, format=record, device=values.device, dtype=values.dtype)
    return execute(request, values, record, amax=amax, draw=drawn, name=name)


fake_quantize_operator.register_fake(
    lambda values, format, amax, draw, name: torch.empty_like(values, memory_format=torch.contiguous_format)
)


@torch.library.custom_op(
    "microscale::dequantize",
    mutates_args=(),
    schema="(Tensor[] parts, str[] names, str format, SymInt[] shape, ScalarType dtype, str layout) -> Tensor",
)
def dequantize_operator(
    parts: Sequence[Tensor], names: Sequence[str], format: str, shape: Sequence[int], dtype: torch.dtype, layout: str
) -> Tensor:
    """Run dequantize on the named parts."""
    record = _resolved(format)
    tensor = QuantizedTensor(
        format=record, shape=tuple(shape), dtype=dtype, parts=dict(zip(names, parts, strict=True)), layout=layout
    )
    request = Request(
        operation=Operation.DEQUANTIZE, format=record, device=tensor.device, dtype=dtype, layout=tensor.layout
    )
    return execute(request, tensor, dtype)


dequantize_operator.register_fake(
    lambda parts, names, format, shape, dtype, layout: parts[0].new_empty(tuple(shape), dtype=dtype)
)


@torch.library.custom_op(
    "microscale::linear",
    mutates_args=(),
    schema=(
        "(Tensor inputs, Tensor[] parts, str[] names, str format, SymInt rows, ScalarType dtype, str layout,"
        " Tensor? bias, str? activations) -> Tensor"
    ),
)
def linear_operator(
    inputs: Tensor,
    parts: Sequence[Tensor],
    names: Sequence[str],
    format: str,
    rows: int,
    dtype: torch.dtype,
    layout: str,
    bias: Tensor | None,
    activations: str | None,
) -> Tensor:
    """Run linear on the named parts of a weight [rows, cols]."""
    shape = (rows, inputs.shape[-1])
    record = _resolved(format)
    weight = QuantizedTensor(
        format=record, shape=shape, dtype=dtype, parts=dict(zip(names, parts, strict=True)), layout=layout
    )
    rounding = None if activations is None else _resolved(activations)
    request = Request(
        operation=Operation.LINEAR,
        format=record,
        device=inputs.device,
        dtype=inputs.dtype,
        layout=layout,
        activations=rounding,
    )
    return execute(request, inputs, weight, bias, rounding)


linear_operator.register_fake(
    lambda inputs, parts, names, format, rows, *_: inputs.new_empty((*inputs.shape[:-1], rows))
)


@torch.compiler.assume_constant_result
def spec_of(fmt: Format | str) -> str:
    """Return the spec of a format; a constant for the compiler, which need not read our records."""
    return fmt if isinstance(fmt, str) else format_name(fmt)


def traced_fake_quantize(
    values: Float[Tensor, "..."], fmt: Format | str, amax: Tensor | None, draw: Draw | None, name: str
) -> Float[Tensor, "..."]:
    """Put fake_quantize into the graph that is being traced."""
    numbers = None if draw is None else [draw.seed, draw.step, draw.place]
    return torch.ops.microscale.fake_quantize(values, spec_of(fmt), amax, numbers, name)


def traced_dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Put dequantize into the graph that is being traced."""
    return torch.ops.microscale.dequantize(
        list(tensor.parts.values()),
        list(tensor.parts),
        spec_of(tensor.format),
        list(tensor.shape),
        dtype,
        tensor.layout,
    )


def traced_linear(
    inputs: Float[Tensor, "... cols"],
    weight: QuantizedTensor,
    bias: Float[Tensor, "rows"] | None,
    activations: Format | str | None,
) -> Float[Tensor, "... rows"]:
    """Put linear into the graph that is being traced."""
    return torch.ops.microscale.linear(
        inputs,
        list(weight.parts.values()),
        list(weight.parts),
        spec_of(weight.format),
        weight.shape[0],
        weight.dtype,
        weight.layout,
        bias,
        None if activations is None else spec_of(activations),
    )
