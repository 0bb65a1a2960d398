"""The operations of microscale, each with its one contract; :mod:`microscale.kernels.dispatch` picks who runs it.

Exactness: ``quantize``, ``dequantize`` and ``fake_quantize`` are defined bit for bit by the reference backend, and
every other backend must give the same bits. ``linear`` is a float sum whose order is free: a backend must stay
within the bound that its tests derive from the dtype and the length of the sum.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.errors import DtypeError, ShapeError
from microscale.formats import Format, parse_format
from microscale.kernels.cpu import torch_ops
from microscale.kernels.dispatch import Operation, Request, choose
from microscale.layouts.row_major import NAME as ROW_MAJOR
from microscale.tensor import QuantizedTensor


def quantize(
    values: Float[Tensor, "..."],
    fmt: Format | str,
    *,
    amax: Float[Tensor, "..."] | None = None,
    name: str = "the tensor",
) -> QuantizedTensor:
    """Quantize a float32, bfloat16 or float16 tensor along its last axis.

    Formula: for every block, factor = rule(block); code = round(x / factor), all in float32.
    ``amax`` replaces the measured maximum (a calibrated statistic): the tensor's where the format has a scale per
    tensor, else each block's, broadcast to the grid of blocks. ``name`` appears in error messages.

    Special values: a block with NaN (or Inf, by policy) becomes all NaN or raises; a zero block gets the smallest
    scale and zero codes; -0 keeps its sign in float elements; float32 subnormals are exact; a magnitude past the
    element's largest saturates (or becomes Inf/NaN by policy); a tie goes by the format's rounding. A ragged last
    block is padded with zeros.

    Raises:
        NonFiniteError: NaN or Inf under the policy ``nan_raise``; an ``amax`` that is not finite or negative.
        DtypeError: not one of the three float types.
        ShapeError: a scalar or an empty tensor; an ``amax`` that does not fit the grid of blocks.
        FormatError: an ``amax`` for a format that cannot use one (zero point, pair, std and percentile of a block).

    Source: OCP MX v1.0 section 6.3; arXiv 2510.14557 section 4 (plus, plusplus); docs/formats.md for all others.
    """
    record = parse_format(fmt)
    _check_tensor(values, name)
    request = Request(
        operation=Operation.QUANTIZE, format=record, device=values.device, dtype=values.dtype, layout=ROW_MAJOR
    )
    return choose(request).implementations[Operation.QUANTIZE](values, record, amax=amax, name=name)


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype | None = None) -> Float[Tensor, "..."]:
    """Return the values of a quantized tensor in its own float dtype, or in ``dtype``.

    Formula: value = decode(code) * factor in float32 (one rounding), then the cast to ``dtype``.

    Special values: a NaN scale makes its block NaN; a product past float32 is Inf, below it a subnormal or 0.
    """
    if torch.compiler.is_compiling():
        return torch_ops.traced_dequantize(tensor, dtype or tensor.dtype)
    request = _tensor_request(Operation.DEQUANTIZE, tensor, dtype or tensor.dtype)
    return choose(request).implementations[Operation.DEQUANTIZE](tensor, dtype)


def fake_quantize(
    values: Float[Tensor, "..."],
    fmt: Format | str,
    *,
    amax: Float[Tensor, "..."] | None = None,
    name: str = "the tensor",
) -> Float[Tensor, "..."]:
    """Return dequantize(quantize(values)) in the dtype of the input, without storing the codes.

    Special values and errors: as :func:`quantize`.
    """
    if torch.compiler.is_compiling():
        return torch_ops.traced_fake_quantize(values, fmt, amax, name)
    record = parse_format(fmt)
    _check_tensor(values, name)
    request = Request(
        operation=Operation.FAKE_QUANTIZE, format=record, device=values.device, dtype=values.dtype, layout=ROW_MAJOR
    )
    return choose(request).implementations[Operation.FAKE_QUANTIZE](values, record, amax=amax, name=name)


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

    Exactness: every product is of exact factors. With e the unit roundoff of float32 (2^-24), s = sum |x_i w_i| + |bias|
    and n = cols + 4 * blocks of a row + 4, a float32 result differs from the exact one by at most n * e * s plus cols *
    2^-100 * max |w|; bfloat16 and float16 results by one rounding to that dtype more. (A block's sum is rounded at most
    3 times more, and subnormal factors may count as 0.) A backend may also cast weights and rounded activations to the
    dtype of the inputs before the product, as the reference does: one rounding more for each. The result does not
    depend on the number of threads, nor on the other rows of the inputs (but for a format with a scale of the whole
    tensor, and for which of the kernels for one row and for many is taken).

    Special values: NaN or Inf in a row of inputs, or a NaN scale of the weight, make the outputs that they enter NaN or
    Inf; no rows give no outputs.

    Raises:
        ShapeError: shapes that do not fit together.
        DtypeError: inputs that are not a float tensor.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
        found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DtypeError(f"linear takes a float tensor as inputs, got {found}; cast it first")
    if len(weight.shape) != 2 or inputs.dim() == 0 or inputs.shape[-1] != weight.cols:
        raise ShapeError(
            "linear takes inputs [..., cols] and a weight [rows, cols], got"
            f" {list(inputs.shape)} and {list(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.rows,):
        raise ShapeError(f"the bias of a weight {list(weight.shape)} is [{weight.rows}], got {list(bias.shape)}")
    if torch.compiler.is_compiling():
        return torch_ops.traced_linear(inputs, weight, bias, activations)
    record = None if activations is None else parse_format(activations)
    request = Request(
        operation=Operation.LINEAR,
        format=weight.format,
        device=inputs.device,
        dtype=inputs.dtype,
        layout=weight.layout,
        activations=record,
        records_gradient=torch.is_grad_enabled() and inputs.requires_grad,
    )
    return choose(request).implementations[Operation.LINEAR](inputs, weight, bias, record)


def _check_tensor(values: object, name: str) -> None:
    if not isinstance(values, Tensor):
        raise DtypeError(f"{name} must be a torch tensor, got {type(values).__name__}; wrap it in torch.tensor(…)")


def _tensor_request(operation: Operation, tensor: QuantizedTensor, dtype: torch.dtype) -> Request:
    return Request(operation=operation, format=tensor.format, device=tensor.device, dtype=dtype, layout=tensor.layout)
