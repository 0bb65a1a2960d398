"""The operations of microscale, each with its one contract; :mod:`microscale.kernels.dispatch` picks who runs it.

Exactness: ``quantize``, ``dequantize`` and ``fake_quantize`` are defined bit for bit by the reference backend, and
every other backend must give the same bits. ``linear`` is a float sum whose order is free: a backend must stay
within the bound that its tests derive from the dtype and the length of the sum.

``rms_norm``, ``silu_mul`` and ``hadamard`` compute in float32 and round once to the dtype of the input. ``hadamard``
is bit for bit the same everywhere; the other two stay within the bounds stated with them. A fused ``*_quantize``
gives bit for bit what ``quantize`` makes of its backend's own result, for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microscale.errors import DtypeError, ShapeError, check_kind
from microscale.formats import Draw, Format, parse_format
from microscale.kernels import torch_ops
from microscale.kernels.backend import Operation, Request
from microscale.kernels.checks import check_draw, check_float_dtype, check_quantized, linear_request
from microscale.kernels.dispatch import execute
from microscale.tensor import QuantizedTensor


def quantize(
    values: Float[Tensor, "..."],
    fmt: Format | str,
    *,
    amax: Float[Tensor, "..."] | None = None,
    draw: Draw | None = None,
    name: str = "the tensor",
) -> QuantizedTensor:
    """Quantize a float32, bfloat16 or float16 tensor along its last axis.

    Formula: for every block, factor = rule(block); code = round(x / factor), all in float32.
    ``amax`` replaces the measured maximum (a calibrated statistic): the tensor's where the format has a scale per
    tensor, else each block's, broadcast to the grid of blocks. ``draw`` is what stochastic rounding draws from
    (other roundings do not look at it): element i, counted as row * padded columns + column, goes up in magnitude by
    ``random_bits(i, draw)`` of :mod:`microscale.formats.codec`. None: a draw of the format's seed at step 0, place 0.
    Stream or segment number p of a compound format draws at place + p. ``name`` appears in error messages.

    Special values: a block with NaN (or Inf, by policy) becomes all NaN or raises; a zero block gets the smallest
    scale and zero codes; -0 keeps its sign in float elements; float32 subnormals are exact; a magnitude past the
    element's largest saturates (or becomes Inf/NaN by policy); a tie goes by the format's rounding. A ragged last
    block is padded with zeros.

    Raises:
        NonFiniteError: NaN or Inf under the policy ``nan_raise``; an ``amax`` that is not finite or negative.
        DtypeError: not one of the three float types.
        ShapeError: a scalar or an empty tensor; an ``amax`` that does not fit the grid of blocks.
        FormatError: an ``amax`` for a format that cannot use one (zero point, pair, std and percentile of a block).
        ArgumentError: an ``amax`` that is no tensor, a ``draw`` that is none.

    Source: OCP MX v1.0 section 6.3; arXiv 2510.14557 section 4 (plus, plusplus); all others:
    docs/reference/formats.md.
    """
    record = parse_format(fmt)
    _check_rounding(values, amax, draw, name)
    request = Request(operation=Operation.QUANTIZE, format=record, device=values.device, dtype=values.dtype)
    return execute(request, values, record, amax=amax, draw=draw, name=name)


def dequantize(
    tensor: QuantizedTensor, dtype: torch.dtype | None = None, *, out: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """Return the values of a quantized tensor in its own float dtype, or in ``dtype``.

    Formula: value = decode(code) * factor in float32 (one rounding), then the cast to ``dtype``. ``out`` takes the
    values and is returned: writing into memory that exists already is several times faster than into new pages.

    Special values: a NaN scale makes its block NaN; a product past float32 is Inf, below it a subnormal or 0.

    Raises:
        ShapeError: an ``out`` of another shape, or not contiguous.
        DtypeError: an ``out`` of another dtype; a dtype that is no float.
        ArgumentError: something else than a quantized tensor, a dtype or a tensor.
    """
    check_quantized(tensor, "what is dequantized")
    if out is not None:
        _check_out(out, tensor, dtype)
    wanted = (tensor.dtype if out is None else out.dtype) if dtype is None else dtype
    check_float_dtype(wanted, "the dtype of dequantize")
    if torch.compiler.is_compiling():
        values = torch_ops.traced_dequantize(tensor, wanted)
        return values if out is None else out.copy_(values)
    request = Request(
        operation=Operation.DEQUANTIZE, format=tensor.format, device=tensor.device, dtype=wanted, layout=tensor.layout
    )
    return execute(request, tensor, wanted, out)


def _check_out(out: object, tensor: QuantizedTensor, dtype: torch.dtype | None) -> None:
    check_kind(out, Tensor, "out", "a torch tensor")
    assert isinstance(out, Tensor)
    if tuple(out.shape) != tuple(tensor.shape) or not out.is_contiguous():
        raise ShapeError(
            f"out must be contiguous and of shape {list(tensor.shape)}, got {list(out.shape)}, strides {out.stride()}"
        )
    wanted = out.dtype if dtype is None else dtype
    if out.dtype != wanted or out.device != tensor.device:
        raise DtypeError(f"out must be {wanted} on {tensor.device}, got {out.dtype} on {out.device}")


def fake_quantize(
    values: Float[Tensor, "..."],
    fmt: Format | str,
    *,
    amax: Float[Tensor, "..."] | None = None,
    draw: Draw | None = None,
    name: str = "the tensor",
) -> Float[Tensor, "..."]:
    """Return dequantize(quantize(values)) in the dtype of the input, without storing the codes.

    Special values and errors: as :func:`quantize`.
    """
    if torch.compiler.is_compiling():
        return torch_ops.traced_fake_quantize(values, fmt, amax, draw, name)
    record = parse_format(fmt)
    _check_rounding(values, amax, draw, name)
    request = Request(operation=Operation.FAKE_QUANTIZE, format=record, device=values.device, dtype=values.dtype)
    return execute(request, values, record, amax=amax, draw=draw, name=name)


def linear(
    inputs: Float[Tensor, "... cols"],
    weight: QuantizedTensor,
    bias: Float[Tensor, "rows"] | None = None,
    *,
    activations: Format | str | None = None,
) -> Float[Tensor, "... rows"]:
    """Return x @ dequantize(weight).T + bias in the dtype of the inputs, x = fake_quantize(inputs, activations).

    The weight is [rows, cols]. ``activations`` is the format that the inputs are rounded to on the fly, exactly; None
    keeps them as they are.

    Exactness: every product is of exact factors. With e the unit roundoff of float32 (2^-24), s = sum |x_i w_i| +
    |bias| and n = cols + 4 * blocks of a row + 4, a float32 result differs from the exact one by at most n * e * s
    plus cols * 2^-100 * max |w|; bfloat16 and float16 results by one rounding to that dtype more. (A block's sum is
    rounded at most 3 times more, and subnormal factors may count as 0.) A backend may also cast weights and rounded
    activations to the dtype of the inputs before the product, as the reference does: one rounding more for each. The
    result does not depend on the number of threads, nor on the other rows of the inputs (but for a format with a
    scale of the whole tensor, and for which of the kernels for one row and for many is taken).

    Range: a row of inputs may overflow where max |x| times the largest element value times cols passes 2^127, even if
    small scales would bring the exact result back. Gradients (recorded by the reference): those of the inputs and the
    bias, as if the inputs were kept: a rounding passes them unchanged.

    Special values: NaN or Inf in a row of inputs, or a NaN scale of the weight, make the outputs that they enter NaN or
    Inf; no rows give no outputs.

    Raises:
        ShapeError: shapes that do not fit together.
        DtypeError: inputs or a bias that are not float tensors, or lie on different devices.
    """
    _check_inputs(inputs)
    check_quantized(weight, "the weight of linear")
    if len(weight.shape) != 2 or inputs.shape[-1] != weight.cols:
        raise ShapeError(
            "linear takes inputs [..., cols] and a weight [rows, cols], got"
            f" {list(inputs.shape)} and {list(weight.shape)}"
        )
    _check_bias(bias, weight.rows, inputs)
    if torch.compiler.is_compiling():
        return torch_ops.traced_linear(inputs, weight, bias, activations)
    record = None if activations is None else parse_format(activations)
    request = linear_request(Operation.LINEAR, inputs, weight, bias, record)
    return execute(request, inputs, weight, bias, record)


def rms_norm(values: Float[Tensor, "... cols"], weight: Float[Tensor, "cols"], eps: float) -> Float[Tensor, "... cols"]:
    """Return values / sqrt(mean(values^2) + eps) * weight along the last axis.

    Exactness: the order of the sum is free. Every number is within (cols / 2 + 8) * 2^-24 of the exact one,
    relatively, before the rounding to the dtype of the input: a sum of squares is off by cols * 2^-24 at most, and its
    root by half of that. This takes a mean + eps that is a normal float32.

    Special values: NaN makes its row NaN; beside an Inf, which becomes NaN, finite numbers become 0; a sum of squares
    past float32 is Inf, so that such a row becomes 0.

    Raises:
        ShapeError: a weight that does not belong to the last axis.
        DtypeError: not one of the three float types.
    """
    return _run(Operation.RMS_NORM, values, None, weight, eps)


def silu_mul(gate: Float[Tensor, "..."], up: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return gate / (1 + exp(-gate)) * up.

    Exactness: every number is within 8 * 2^-24 of the exact one, relatively, before the rounding to the dtype of the
    input; where exp(-gate) leaves float32 (gate below -88) or the result is subnormal, within 2^-118 * |up|.

    Special values: NaN stays NaN; a gate of -Inf is NaN, of Inf it is Inf * up.

    Raises:
        ShapeError, DtypeError: gate and up do not belong together.
    """
    return _run(Operation.SILU_MUL, gate, None, up)


def hadamard(
    values: Float[Tensor, "... cols"], size: int, signs: Float[Tensor, "cols"] | None = None
) -> Float[Tensor, "... cols"]:
    """Return the normalised Walsh-Hadamard transform of every ``size`` (16, 32, 64 or 128) numbers of the last axis.

    Formula: values times ``signs`` where they are given; then for distance d = 1, 2, 4, … below ``size`` every pair
    (a, b) of numbers d apart, whose place has bit d clear in a, becomes (a + b, a - b); then times
    1 / float32(sqrt(size)) in float32.

    Exactness: bit for bit, for the order of the sums is part of the definition.

    Special values: NaN and Inf spread over their block.

    Raises:
        ShapeError: a size that is not possible or does not divide the last axis.
        DtypeError: not one of the three float types; signs that are not float32.
    """
    return _run(Operation.HADAMARD, values, None, size, signs)


def rms_norm_quantize(
    values: Float[Tensor, "... cols"], weight: Float[Tensor, "cols"], eps: float, fmt: Format | str
) -> QuantizedTensor:
    """Return quantize(rms_norm(values, weight, eps), fmt), bit for bit, without storing the normalised numbers."""
    record = parse_format(fmt)
    return _run(Operation.RMS_NORM_QUANTIZE, values, record, weight, eps, record)


def silu_mul_quantize(gate: Float[Tensor, "..."], up: Float[Tensor, "..."], fmt: Format | str) -> QuantizedTensor:
    """Return quantize(silu_mul(gate, up), fmt), bit for bit, without storing the product."""
    record = parse_format(fmt)
    return _run(Operation.SILU_MUL_QUANTIZE, gate, record, up, record)


def gather_quantize(values: Float[Tensor, "... cols"], columns: Int[Tensor, "n"], fmt: Format | str) -> QuantizedTensor:
    """Return quantize(values[..., columns], fmt), bit for bit: channels in another order, or some of them.

    Raises:
        ShapeError: a column that does not exist.
        DtypeError: columns that are not int64.
    """
    record = parse_format(fmt)
    return _run(Operation.GATHER_QUANTIZE, values, record, columns, record)


def hadamard_quantize(
    values: Float[Tensor, "... cols"], size: int, fmt: Format | str, signs: Float[Tensor, "cols"] | None = None
) -> QuantizedTensor:
    """Return quantize(hadamard(values, size, signs), fmt), bit for bit."""
    record = parse_format(fmt)
    return _run(Operation.HADAMARD_QUANTIZE, values, record, size, record, signs)


def _run(operation: Operation, values: Tensor, fmt: Format | None, *arguments: object) -> Any:
    """Run an operation on a float tensor with the arguments that follow it."""
    _check_tensor(values, f"the input of {operation.value}")
    request = Request(operation=operation, format=fmt, device=values.device, dtype=values.dtype)
    return execute(request, values, *arguments)


def linear_mixed(
    inputs: Float[Tensor, "... cols"],
    weights: Sequence[QuantizedTensor],
    activations: Sequence[Format | str | None],
    bias: Float[Tensor, "rows"] | None = None,
) -> Float[Tensor, "... rows"]:
    """Return the sum over segments of x_i @ dequantize(weights[i]).T, plus bias, in the dtype of the inputs.

    The weights [rows, cols_i] take consecutive segments of the columns; x_i is that segment of the inputs, rounded to
    ``activations[i]`` as a tensor of its own (None: kept). So channels of one layer may have different formats.

    Exactness: the bound of :func:`linear`, summed over the segments, plus one rounding for each segment.

    Raises:
        ShapeError: segments of different heights, or that do not fill the inputs.

    Source: the mixed channels of arXiv 2508.02343.
    """
    _check_inputs(inputs)
    check_kind(weights, (list, tuple), "weights", "a list of quantized tensors")
    check_kind(activations, (list, tuple), "activations", "a list of formats or None")
    for weight in weights:
        check_quantized(weight, "each weight of linear_mixed")
    shapes = [tuple(weight.shape) for weight in weights]
    is_filled = all(len(shape) == 2 for shape in shapes) and inputs.shape[-1] == sum(shape[1] for shape in shapes)
    if not weights or len(activations) != len(weights) or not is_filled:
        raise ShapeError(
            "linear_mixed takes inputs [..., cols] whose columns the weights [rows, cols_i] fill, with a format or None"
            f" each; got {list(inputs.shape)}, weights {shapes} and {len(activations)} formats"
        )
    if len({weight.rows for weight in weights}) != 1:
        raise ShapeError(f"the segments of one layer have equal rows, got {[weight.rows for weight in weights]}")
    _check_bias(bias, weights[0].rows, inputs)
    records = [None if fmt is None else parse_format(fmt) for fmt in activations]
    requests = [
        linear_request(Operation.LINEAR_MIXED, inputs, weight, bias, record)
        for weight, record in zip(weights, records, strict=True)
    ]
    return execute(requests, inputs, weights, records, bias)


def _check_inputs(inputs: object) -> None:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise DtypeError(f"linear takes a float tensor as inputs, got {found}; cast it first")
    if inputs.dim() == 0:
        raise ShapeError("linear takes inputs [..., cols], got a scalar")


def _check_bias(bias: object, rows: int, inputs: Tensor) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor) or not bias.is_floating_point() or bias.device != inputs.device:
        found = f"{bias.dtype} on {bias.device}" if isinstance(bias, Tensor) else type(bias).__name__
        raise DtypeError(f"the bias is a float tensor on {inputs.device}, as the inputs are, got {found}")
    if tuple(bias.shape) != (rows,):
        raise ShapeError(f"the bias of a weight with {rows} rows is [{rows}], got {list(bias.shape)}")


def _check_rounding(values: object, amax: object, draw: object, name: str) -> None:
    check_kind(name, str, "the name of a tensor", "a text")
    _check_tensor(values, name)
    check_kind(amax, (Tensor, type(None)), f"the amax of {name}", "a tensor or None")
    check_draw(draw)


def _check_tensor(values: object, name: str) -> None:
    if not isinstance(values, Tensor):
        raise DtypeError(f"{name} must be a torch tensor, got {type(values).__name__}; wrap it in torch.tensor(…)")
