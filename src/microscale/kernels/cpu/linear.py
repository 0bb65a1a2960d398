"""linear on the CPU: calls prepared once, run many times with a few microseconds of Python.

:func:`prepare_linear` takes one or more quantized weights that share their input and returns a :class:`LinearCall`; its
``run`` checks the two tensors and makes one native call. The exactness contract is that of
:func:`microscale.kernels.ops.linear`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.errors import DtypeError, KernelError, ShapeError
from microscale.formats import BlockFormat, Format, SegmentedFormat, VectorBlock, format_name
from microscale.kernels.backend import Operation, Request
from microscale.kernels.cpu import enums
from microscale.kernels.cpu.activations import activation_refusal, plan_activations
from microscale.kernels.cpu.enums import DTYPES
from microscale.kernels.cpu.native import NATIVE, UNAVAILABLE, level, num_threads
from microscale.kernels.cpu.rows16 import NAME as ROWS16
from microscale.kernels.cpu.weights import PackedWeight, pack_weight
from microscale.kernels.operands import Combine, WeightGroup
from microscale.tensor import QuantizedTensor

_TERMS = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 3}
"""How many bfloat16 terms hold an activation of a dtype exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCall:
    """A prepared product: inputs [rows, cols] to outputs [rows, rows_out], both contiguous and of ``dtype``."""

    handle: Any
    cols: int
    rows_out: int
    dtype: torch.dtype
    num_bytes: int
    kept: tuple[Any, ...]

    def run(self, inputs: Float[Tensor, "rows cols"], out: Float[Tensor, "rows rows_out"]) -> None:
        """Compute into ``out``.

        Raises:
            ShapeError, DtypeError, KernelError: tensors of another shape, dtype, device, or not contiguous.
        """
        _check("inputs", inputs, self.cols, self.dtype)
        _check("out", out, self.rows_out, self.dtype)
        if inputs.shape[0] != out.shape[0]:
            raise ShapeError(f"inputs have {inputs.shape[0]} rows and out has {out.shape[0]}; they must be equal")
        self.run_pointers(inputs.data_ptr(), inputs.shape[0], out.data_ptr())

    def run_pointers(self, inputs: int, rows: int, out: int, bias: int = 0) -> None:
        """The same on raw addresses, unchecked: [rows, cols] and [rows, rows_out].

        ``bias`` is the address of float32 numbers that stand for the bias of the only output, where it is not 0.
        """
        assert NATIVE is not None
        NATIVE.linear(level(), self.handle, inputs, rows, out, bias, num_threads())


def _as_float32(bias: Tensor) -> Float[Tensor, "rows"]:
    return bias.detach().to(torch.float32).resolve_neg().contiguous()


def _check(name: str, tensor: Tensor, cols: int, dtype: torch.dtype) -> None:
    if tensor.dim() != 2 or tensor.shape[1] != cols:
        raise ShapeError(f"{name} must be [rows, {cols}], got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise DtypeError(f"{name} must be {dtype}, got {tensor.dtype}; cast it, or prepare the call for that dtype")
    if tensor.device.type != "cpu":
        raise KernelError(f"{name} must be on the CPU, got {tensor.device}; move it, or use another backend")
    if not tensor.is_contiguous() or tensor.is_neg():
        raise ShapeError(f"{name} must be contiguous, got strides {tensor.stride()}; call .resolve_neg().contiguous()")


def prepare_linear(
    weights: Sequence[QuantizedTensor],
    biases: Sequence[Tensor | None],
    activations: Format | None = None,
    combine: Combine = Combine.CONCATENATE,
    *,
    dtype: torch.dtype = torch.float32,
) -> LinearCall:
    """Prepare inputs @ [weights].T + biases for weights [rows_i, cols] in the layout rows16 that share their input.

    ``activations`` is the format that the inputs are rounded to on the fly, exactly; None keeps them as they are.

    Raises:
        KernelError: no compiled kernels; a layout, device or activation format that they do not take.
        ShapeError: weights of different widths, a bias of another length, or SILU_MUL of other than two equal weights.
    """
    _check_request([activations], dtype)
    packed = [pack_weight(weight) for weight in weights]
    group = WeightGroup(weights=tuple(weights), biases=tuple(biases), combine=combine)  # checks: they belong together
    draft = _Draft(packed[0].cols, group.rows_out, dtype, combine)
    draft.add_input(0, packed[0].cols, activations)
    column = 0
    for place, (weight, bias) in enumerate(zip(packed, biases, strict=True)):
        draft.add_weight(weight, 0)
        draft.add_output(weight.rows, column, place, 1, bias)
        column += 0 if combine is Combine.SILU_MUL else weight.rows
    return draft.call()


def prepare_linear_mixed(
    weights: Sequence[QuantizedTensor],
    activations: Sequence[Format | None],
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> LinearCall:
    """Prepare sum_i round_i(inputs[:, segment i]) @ weights[i].T + bias in one call.

    The weights [rows, cols_i] take consecutive segments of the columns, each with an activation format of its own, and
    add up into one output [rows]: channels of one layer in different formats (arXiv 2508.02343). A segment is rounded
    as a tensor of its own.

    Raises:
        KernelError, ShapeError, DtypeError: as :func:`prepare_linear`.
    """
    _check_request(activations, dtype)
    packed = [pack_weight(weight) for weight in weights]
    shapes = [(weight.rows, weight.cols) for weight in packed]
    if not packed or len(packed) != len(activations) or len({rows for rows, _ in shapes}) != 1:
        raise ShapeError(f"segments need one number of rows and an activation format (or None) each, got {shapes}")
    rows = packed[0].rows
    _check_bias(bias, rows)
    draft = _Draft(sum(cols for _, cols in shapes), rows, dtype)
    column = 0
    for place, (weight, fmt) in enumerate(zip(packed, activations, strict=True)):
        draft.add_input(column, weight.cols, fmt)
        draft.add_weight(weight, place)
        column += weight.cols
    draft.add_output(rows, 0, 0, len(packed), bias)
    return draft.call()


def prepare_segments(
    weight: QuantizedTensor,
    activations: Format | None,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> LinearCall:
    """Prepare the product with one weight of segments; ``activations`` as :func:`segment_activations` takes it.

    Raises:
        KernelError, ShapeError, DtypeError: as :func:`prepare_linear`; segments of the input that are not the weight's.
    """
    each = segment_activations(weight.format, activations)
    if each is None:
        raise KernelError(
            f"segments of the inputs must be those of the weight {format_name(weight.format)}, got"
            f" {None if activations is None else format_name(activations)}; quantize the inputs beforehand"
        )
    return prepare_linear_mixed(weight.segments, each, bias, dtype=dtype)


class _Draft:
    """A call in the making: ranges of columns that are rounded alike, the weights that take them, and the outputs."""

    def __init__(self, cols: int, rows_out: int, dtype: torch.dtype, combine: Combine = Combine.CONCATENATE) -> None:
        assert NATIVE is not None
        self._cols, self._rows_out, self._dtype = cols, rows_out, dtype
        self._handle = NATIVE.LinearCall(
            combine=enums.Combine[combine.name], dtype=DTYPES[dtype], input_stride=cols, output_stride=rows_out
        )
        self._kept: list[Any] = []

    def add_input(self, first_column: int, cols: int, activations: Format | None) -> None:
        """Add a range of columns of the inputs, rounded to a format."""
        plan, terms = plan_activations(activations), _TERMS[self._dtype]
        self._handle.add_input(first_column=first_column, cols=cols, rule=plan.rule, terms=terms, act=plan.handle)
        self._kept.append(plan)

    def add_weight(self, weight: PackedWeight, place: int) -> None:
        """Add a weight that multiplies the input at a place."""
        self._handle.add_segment(weight=weight.handle, input=place)
        self._kept.append(weight)

    def add_output(self, rows: int, first_column: int, first: int, count: int, bias: Tensor | None) -> None:
        """Add a range of columns of the result: the sum of ``count`` weights from ``first`` on."""
        added = None if bias is None else _as_float32(bias)
        address = 0 if added is None else added.data_ptr()
        self._handle.add_output(rows=rows, first_column=first_column, first=first, count=count, bias=address)
        self._kept.append(added)

    def call(self) -> LinearCall:
        """Return the call; it holds all whose memory it points into."""
        num_bytes = sum(each.num_bytes for each in self._kept if isinstance(each, PackedWeight))
        return LinearCall(
            handle=self._handle,
            cols=self._cols,
            rows_out=self._rows_out,
            dtype=self._dtype,
            num_bytes=num_bytes,
            kept=tuple(self._kept),
        )


def linear_mixed(
    inputs: Float[Tensor, "... cols"],
    weights: Sequence[QuantizedTensor],
    activations: Sequence[Format | None],
    bias: Float[Tensor, "rows"] | None,
) -> Float[Tensor, "... rows"]:
    """Sum the products of all segments; see :func:`microscale.kernels.ops.linear_mixed` for the contract."""
    call = prepare_linear_mixed(weights, activations, bias, dtype=inputs.dtype)
    matrix = inputs.detach().reshape(-1, inputs.shape[-1]).resolve_neg().contiguous()
    out = torch.empty(matrix.shape[0], call.rows_out, dtype=inputs.dtype)
    if matrix.shape[0]:
        call.run(matrix, out)
    return out.reshape(*inputs.shape[:-1], call.rows_out)


def linear_refusal(layout: str, weight: Format | None, activations: Format | None) -> str | None:
    """Return why :func:`linear` cannot multiply by a weight, or None where it can."""
    if layout != ROWS16:
        return f"reads weights in the layout {ROWS16} only, not {layout}"
    refusal = activation_refusal(activations)
    if refusal is None and weight is not None and segment_activations(weight, activations) is None:
        refusal = "the segments of its input and of its weight differ"
    return None if refusal is None else f"cannot round its input on the fly: {refusal}"


def describe_linear(request: Request) -> str | None:
    """Return what becomes of the inputs of a product that is not refused; None for other operations."""
    if request.operation is not Operation.LINEAR or request.format is None:
        return None
    each = segment_activations(request.format, request.activations) or []
    rule = enums.ActRule
    words = {rule.KEEP: "kept", rule.INTEGER: "rounded to integers", rule.NUMBER: "rounded to floats"}
    return f"inputs {' and '.join(dict.fromkeys(words[plan_activations(fmt).rule] for fmt in each))}"


def segment_activations(weight: Format, activations: Format | None) -> Sequence[Format | None] | None:
    """Return the format of each segment's input; None where an input's segments or blocks cross those of the weight.

    A weight without segments has one.
    """
    if not isinstance(weight, SegmentedFormat):
        return None if isinstance(activations, SegmentedFormat) else [activations]
    widths = [segment.cols for segment in weight.segments]
    if isinstance(activations, SegmentedFormat):
        own = [segment.cols for segment in activations.segments]
        return [segment.format for segment in activations.segments] if own == widths else None
    if activations is None:
        return [None] * len(widths)
    if not isinstance(activations, BlockFormat) or activations.tensor_scale is not None:
        return None
    if not isinstance(activations.block, VectorBlock):
        return None
    size = activations.block.size
    return None if any(width % size for width in widths[:-1]) else [activations] * len(widths)


def _check_request(activations: Sequence[Format | None], dtype: torch.dtype) -> None:
    if NATIVE is None:
        raise KernelError(UNAVAILABLE or "")
    refusal = next((reason for fmt in activations if (reason := activation_refusal(fmt))), None)
    if refusal is not None:
        raise KernelError(f"the CPU kernels cannot round their input on the fly: {refusal}; quantize it beforehand")
    if dtype not in DTYPES:
        raise DtypeError(f"linear computes in float32, bfloat16 or float16, got {dtype}")


def _check_bias(bias: Tensor | None, rows: int) -> None:
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ShapeError(f"the bias of a weight with {rows} rows is [{rows}], got {list(bias.shape)}")


CACHED_CALLS = 4096
"""How many prepared calls :func:`linear` remembers: enough for every layer of a large model."""

_calls: OrderedDict[Hashable, LinearCall] = OrderedDict()


def linear(
    inputs: Float[Tensor, "... cols"],
    weight: QuantizedTensor,
    bias: Float[Tensor, "rows"] | None,
    activations: Format | None,
) -> Float[Tensor, "... rows"]:
    """Return inputs @ weight.T + bias; see :func:`microscale.kernels.ops.linear` for the contract.

    The prepared call is remembered by the addresses of the weight's parts and by all else that it is made of.
    """
    matrix = inputs.detach().reshape(-1, inputs.shape[-1]).resolve_neg().contiguous()
    out = torch.empty(matrix.shape[0], weight.rows, dtype=inputs.dtype)
    if matrix.shape[0]:
        call = _remembered(weight, activations, inputs.dtype)
        added = None if bias is None else _as_float32(bias)
        call.run_pointers(matrix.data_ptr(), matrix.shape[0], out.data_ptr(), 0 if added is None else added.data_ptr())
    return out.reshape(*inputs.shape[:-1], weight.rows)


def _remembered(weight: QuantizedTensor, activations: Format | None, dtype: torch.dtype) -> LinearCall:
    parts = weight.parts
    if any(name.startswith("sparse_") for name in parts) or not all(part.is_contiguous() for part in parts.values()):
        return _prepared(weight, activations, dtype)  # holds copies of what may change
    key = (
        weight.format,
        weight.shape,
        dtype,
        activations,
        tuple(part.data_ptr() for part in parts.values()),
        tuple(float(part) for name, part in parts.items() if name.endswith("tensor_inv_scale")),
    )
    found = _calls.get(key)
    if found is None:
        made = _prepared(weight, activations, dtype)
        # Without the tensors: the addresses are the key, so that a call is right whenever it is found.
        kept = [replace(each, kept=()) if isinstance(each, PackedWeight) else each for each in made.kept]
        found = replace(made, kept=tuple(kept))
        _calls[key] = found
        if len(_calls) > CACHED_CALLS:
            _calls.popitem(last=False)
    return found


def _prepared(weight: QuantizedTensor, activations: Format | None, dtype: torch.dtype) -> LinearCall:
    if not isinstance(weight.format, SegmentedFormat):
        return prepare_linear([weight], [None], activations, dtype=dtype)
    return prepare_segments(weight, activations, dtype=dtype)
