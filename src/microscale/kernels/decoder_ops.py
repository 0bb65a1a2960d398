"""The operations of a decoder between and around its linear layers, each with its one contract.

Each function checks its operands and returns a :class:`~microscale.kernels.backend.Call`:
:func:`microscale.kernels.plan.run` runs it at once, :func:`microscale.kernels.plan.bind` makes it part of a plan. All
results are written into operands, so that a plan allocates nothing. Operands are contiguous and lie on one device.

Exactness: sums are float32 sums whose order depends on shapes and positions only, never on the number of threads, and
results are rounded once to the dtype of where they go. With u = 2^-24, a sum of n products is off by (n + 1) u times
the sum of their magnitudes, an exponential by 4 u relatively, every further operation by u. Special values: NaN in a
row or head makes that row or head NaN; Inf follows IEEE arithmetic. No rows give no results.

Every function raises ShapeError or DtypeError for operands that do not fit together.

Source: RMSNorm arXiv 1910.07467; rotary embedding arXiv 2104.09864 (halves as pairs, as transformers has it); online
softmax arXiv 1805.02867; grouped queries arXiv 2305.13245; the gates arXiv 2002.05202.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.errors import DtypeError, KernelError, ShapeError, check_kind
from microscale.formats import Format, format_name, parse_format
from microscale.formats.dtypes import FLOAT_DTYPES
from microscale.kernels import dispatch
from microscale.kernels.backend import Call, Operation, Request, StepKind
from microscale.kernels.checks import check_float_dtype
from microscale.kernels.operands import CacheLayout, Gate, KeyValueCache, Rotation, WeightGroup
from microscale.kernels.ops import fake_quantize
from microscale.kernels.straight_through import straight_through

_WIDE = (torch.float32,)


def _call(kind: StepKind, operation: Operation, like: Tensor, *arguments: object, **facts: Any) -> Call:
    request = Request(operation=operation, dtype=like.dtype, device=like.device, **facts)
    return Call(kind=kind, requests=(request,), arguments=arguments)


def _check(
    name: str, tensor: object, shape: Sequence[int], device: torch.device, dtypes: Sequence[torch.dtype] = _WIDE
) -> None:
    check_kind(tensor, Tensor, name, "a torch tensor")
    assert isinstance(tensor, Tensor)
    if tensor.dtype not in dtypes:
        raise DtypeError(f"{name} must be {' or '.join(str(dtype) for dtype in dtypes)}, got {tensor.dtype}; cast it")
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device or not tensor.is_contiguous() or tensor.is_neg():
        raise ShapeError(f"{name} must be contiguous and on {device}, got strides {tensor.stride()} on {tensor.device}")


def _check_matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    check_kind(tensor, Tensor, name, "a torch tensor")
    if tensor.dim() != 2:
        raise ShapeError(f"{name} must have two axes, got {list(tensor.shape)}")
    _check(name, tensor, tensor.shape, tensor.device, FLOAT_DTYPES)
    return tensor.shape[0], tensor.shape[1]


def add_rms_norm(
    residual: Float[Tensor, "rows cols"],
    added: Float[Tensor, "rows cols"] | None,
    weight: Float[Tensor, "cols"],
    eps: float,
    out: Float[Tensor, "rows cols"],
) -> Call:
    """residual += added (where given), then out = residual / sqrt(mean(residual^2) + eps) * weight for each row.

    Exactness: the sum is that of the dtype, bit for bit; the norm as :func:`microscale.kernels.ops.rms_norm`. The
    weight is float32.
    """
    rows, cols = _check_matrix("residual", residual)
    device, dtypes = residual.device, (residual.dtype,)
    _check("out", out, (rows, cols), device, dtypes)
    _check("weight", weight, (cols,), device)
    if added is not None:
        _check("added", added, (rows, cols), device, dtypes)
    return _call(StepKind.NORM, Operation.ADD_RMS_NORM, residual, residual, added, weight, eps, out)


def store_heads(heads: Float[Tensor, "rows width"], cache: KeyValueCache, rotation: Rotation) -> Call:
    """Norm (where given) and rotation of queries and keys; keys and values into the cache, rounded to what it stores.

    A row of ``heads`` holds the queries, then the keys, then the values, each [heads, head_dim]; the queries are
    changed in place, the rest may be. Row t stands at position length + t, which must lie below the capacity.

    Formula: x becomes x / sqrt(mean(x^2) + eps) * norm, then (a, b) the halves of a head become
    (a cos - b sin, b cos + a sin). Exactness: 3 u of the magnitudes of both products, and (head_dim / 2 + 6) u with a
    norm; values are rounded to what the cache stores, and nothing else happens to them.
    """
    _check_heads(heads, cache)
    tables = (cache.capacity, cache.head_dim)
    _check("cosines", rotation.cosines, tables, heads.device)
    _check("sines", rotation.sines, tables, heads.device)
    for name, norm in (("query_norm", rotation.query_norm), ("key_norm", rotation.key_norm)):
        if norm is not None:
            _check(name, norm, (cache.head_dim,), heads.device)
    facts = _cache_facts(cache.stored, cache.layout)
    return _call(StepKind.ATTENTION, Operation.STORE_HEADS, heads, heads, cache, rotation, **facts)


def attend(
    heads: Float[Tensor, "rows width"],
    cache: KeyValueCache,
    out: Float[Tensor, "rows heads_out"],
    *,
    scale: float,
    window: int | None,
) -> Call:
    """out = softmax(q K^T scale) V over the cached positions up to each row's own, the row's own included.

    ``heads`` is as :func:`store_heads` leaves it. ``window`` limits a row to its last so many positions. Weights below
    2.5e-38 of the largest count as 0; scores of any size stay finite.
    """
    rows, num_heads = _check_heads(heads, cache)
    _check("out", out, (rows, num_heads * cache.head_dim), heads.device, (heads.dtype,))
    if window is not None and window < 1:
        raise ShapeError(f"a sliding window has at least one position, got {window}")
    facts = _cache_facts(cache.stored, cache.layout)
    return _call(StepKind.ATTENTION, Operation.ATTEND, heads, heads, cache, out, scale, window, **facts)


def _check_heads(heads: Tensor, cache: KeyValueCache) -> tuple[int, int]:
    """Return rows and query heads."""
    rows, width = _check_matrix("heads", heads)
    num_heads = width // cache.head_dim - 2 * cache.kv_heads
    _check("heads", heads, (rows, (num_heads + 2 * cache.kv_heads) * cache.head_dim), heads.device, FLOAT_DTYPES)
    if num_heads < 1 or num_heads % cache.kv_heads:
        raise ShapeError(f"{num_heads} query heads cannot share {cache.kv_heads} key/value heads evenly")
    if cache.length.device != heads.device:
        raise ShapeError(f"heads and cache must be on one device, got {heads.device} and {cache.length.device}")
    return rows, num_heads


def _cache_facts(stored: Format | torch.dtype, layout: str) -> dict[str, Any]:
    is_dtype = isinstance(stored, torch.dtype)
    return {"layout": layout, "format": None if is_dtype else stored, "stored": stored if is_dtype else None}


def make_cache(
    stored: Format | str | torch.dtype,
    *,
    positions: int,
    kv_heads: int,
    head_dim: int,
    length: Tensor,
    dtype: torch.dtype = torch.float32,
) -> KeyValueCache:
    """Allocate keys and values for at least so many positions, as the first backend wants them that attends to them.

    ``length`` (int64 [1]) is kept as :attr:`KeyValueCache.length`, and says on which device; ``dtype`` is that of the
    heads that will come.

    Raises:
        KernelError: no backend keeps a cache of such numbers.
        DtypeError: a length that is not int64.
        ShapeError: a size below 1, or an odd head_dim, whose halves cannot be rotated.
        ArgumentError, FormatError: arguments of another kind, words that are no format.
    """
    check_kind(length, Tensor, "length", "an int64 tensor")
    _check("length", length, (1,), length.device, (torch.int64,))
    check_float_dtype(dtype, "the dtype of heads")
    for name, size in (("positions", positions), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        check_kind(size, int, name, "a whole number")
    if isinstance(stored, torch.dtype):
        check_float_dtype(stored, "the dtype of a cache")
    else:
        stored = parse_format(stored)
    if min(positions, kv_heads, head_dim) < 1 or head_dim % 2:
        raise ShapeError(
            "a key/value cache needs positions ≥ 1, kv_heads ≥ 1 and an even head_dim, got"
            f" {positions}, {kv_heads} and {head_dim}"
        )
    layout = _choose_cache(stored, dtype, length.device)
    capacity = -(-positions // layout.span) * layout.span
    numbers = stored if isinstance(stored, torch.dtype) else torch.float32
    keys, values = layout.allocate(capacity, kv_heads, head_dim, numbers, length.device)
    return KeyValueCache(
        stored=stored,
        layout=layout.name,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        length=length,
        keys=keys,
        values=values,
    )


def _choose_cache(stored: Format | torch.dtype, dtype: torch.dtype, device: torch.device) -> CacheLayout:
    reasons: list[str] = []
    for backend in dispatch.BACKENDS:
        if backend.cache_layout is None:
            continue
        facts = _cache_facts(stored, backend.cache_layout.name)
        reason = backend.refusal(Request(operation=Operation.ATTEND, dtype=dtype, device=device, **facts))
        if reason is None:
            return backend.cache_layout
        reasons.append(f"\n  {backend.name}: {reason}")
    word = stored if isinstance(stored, torch.dtype) else format_name(stored)
    raise KernelError(f"no backend keeps keys and values in {word} on {device}:{''.join(reasons)}")


def as_cached(values: Float[Tensor, "... head_dim"], stored: Format | torch.dtype, name: str) -> Float[Tensor, "..."]:
    """Return keys or values as a cache holds them, in their own dtype: what :func:`store_heads` rounds them to."""
    if isinstance(stored, torch.dtype):
        return values.to(stored).to(values.dtype)
    return straight_through(values, lambda kept: fake_quantize(kept, stored, name=name))


def gate(pairs: Float[Tensor, "rows twice_cols"], out: Float[Tensor, "rows cols"], kind: Gate) -> Call:
    """out = x sigmoid(z) y with x = pairs[:, :cols], y = pairs[:, cols:].

    z = x for SiLU; z = 2 sqrt(2 / pi) (x + 0.044715 x^3) for the tanh GELU.

    Exactness: (8 + 5 |z|) u relatively, and 1e-36 (1 + |x y|) where the sigmoid leaves the normal float32.
    """
    rows, cols = _check_matrix("out", out)
    _check("pairs", pairs, (rows, 2 * cols), out.device, (out.dtype,))
    return _call(StepKind.LINEAR, Operation.GATE, out, pairs, out, kind)


def linear_dense(
    inputs: Float[Tensor, "rows cols"],
    weight: Float[Tensor, "out_cols cols"],
    bias: Float[Tensor, "out_cols"] | None,
    out: Float[Tensor, "rows out_cols"],
) -> Call:
    """out = inputs weight^T + bias, with a weight of float32 or bfloat16 taken as the float32 numbers that they are."""
    rows, cols = _check_matrix("inputs", inputs)
    out_cols = weight.shape[0]
    _check("weight", weight, (out_cols, cols), inputs.device, (torch.float32, torch.bfloat16))
    _check("out", out, (rows, out_cols), inputs.device, (inputs.dtype,))
    if bias is not None:
        _check("bias", bias, (out_cols,), inputs.device)
    return _call(StepKind.LINEAR, Operation.LINEAR_DENSE, inputs, inputs, weight, bias, out, stored=weight.dtype)


def linear_group(inputs: Float[Tensor, "rows cols"], group: WeightGroup, out: Float[Tensor, "rows out_cols"]) -> Call:
    """Products of the inputs, rounded as the group says, with its weights: side by side, or silu(first) * second.

    Exactness: each product as :func:`microscale.kernels.ops.linear`, then ``silu_mul``.
    """
    rows, _ = _check_matrix("inputs", inputs)
    _check("inputs", inputs, (rows, group.cols), inputs.device, FLOAT_DTYPES)
    _check("out", out, (rows, group.rows_out), inputs.device, (inputs.dtype,))
    weights = [(weight.format, weight.layout) for weight in group.weights]
    requests = linear_group_requests(weights, group.activations, inputs.dtype, inputs.device)
    return Call(kind=StepKind.LINEAR, requests=requests, arguments=(inputs, group, out))


def linear_group_requests(
    weights: Sequence[tuple[Format, str]], activations: Format | None, dtype: torch.dtype, device: torch.device
) -> tuple[Request, ...]:
    """Return what :func:`linear_group` asks for weights of these formats in these layouts."""
    facts: dict[str, Any] = {"activations": activations, "group_size": len(weights)}
    return tuple(
        Request(operation=Operation.LINEAR_GROUP, dtype=dtype, device=device, format=fmt, layout=layout, **facts)
        for fmt, layout in weights
    )


def decoder_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why no compiled kernels run a decoder that computes in a dtype on a device, or None where some do."""
    operations = (Operation.ADD_RMS_NORM, Operation.GATE, Operation.LARGEST_INDEX)
    return dispatch.why_not_compiled(
        *(Request(operation=operation, dtype=dtype, device=device) for operation in operations)
    )


def largest_index(numbers: Float[Tensor, "count"]) -> int:
    """Return the index of the first largest number, of the first NaN where there is one: the greedy choice."""
    check_kind(numbers, Tensor, "numbers", "a torch tensor")
    _check("numbers", numbers, (numbers.numel(),), numbers.device, FLOAT_DTYPES)
    if not numbers.numel():
        raise ShapeError("an empty vector has no largest number")
    return dispatch.execute(
        Request(operation=Operation.LARGEST_INDEX, dtype=numbers.dtype, device=numbers.device), numbers
    )
