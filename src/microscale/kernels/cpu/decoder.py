"""What stands between the linear layers of a decoder, prepared once and run without checks: norms, heads, attention.

Each ``prepare_…`` function checks its tensors and returns a :class:`Step`, whose ``run`` is one native call on the same
memory every time. ``run`` holds the tensors, so that their memory stays as long as it can be called.

Exactness: float32 sums in an order that depends on shapes and positions only, never on the number of threads. Each
function states its terms; the tests bound them against float64. Special values: NaN in a row or head makes that row or
head NaN; Inf follows IEEE arithmetic.

Source: RMSNorm arXiv 1910.07467; rotary embedding arXiv 2104.09864 (halves as pairs, as transformers has it); online
softmax arXiv 1805.02867; grouped queries arXiv 2305.13245.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microscale.errors import DtypeError, KernelError, ShapeError
from microscale.kernels.cpu import native

LANE = 16
"""Positions that lie side by side in the cache of keys."""
SPAN = 64
"""Every capacity is a multiple of this many positions, over which attention goes in one piece."""
SPLIT = 512
"""A single query shares its positions out in pieces of this many."""

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


class StepKind(Enum):
    """What a step is, for the share of time that each kind takes."""

    NORM = "norms"
    LINEAR = "linears"
    ATTENTION = "attention"


class Gate(Enum):
    """The activation function of a gated layer; the value is the name in a transformers config."""

    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"


_GATE_CODES = {Gate.SILU: 0, Gate.GELU_TANH: 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One prepared call: ``run()`` reads and writes the tensors it was prepared with."""

    kind: StepKind
    run: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValueCache:
    """Keys and values of one layer for ``capacity`` positions, allocated once.

    With P = head_dim rounded up to 16: ``keys`` [kv_heads, capacity / 16, head_dim, 16] with 16 positions side by side,
    ``values`` [kv_heads, capacity, P]; both float32 or bfloat16 (rounded to nearest even). Padding holds zero.
    """

    keys: Tensor
    values: Tensor
    kv_heads: int
    head_dim: int
    capacity: int

    @classmethod
    def make(cls, *, positions: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> KeyValueCache:
        """Allocate a cache for at least so many positions.

        Raises:
            DtypeError: neither float32 nor bfloat16.
            ShapeError: a size below 1, or an odd head_dim, whose halves cannot be rotated.
        """
        if dtype not in DTYPE_CODES:
            raise DtypeError(f"a key/value cache is float32 or bfloat16, got {dtype}")
        if min(positions, kv_heads, head_dim) < 1 or head_dim % 2:
            raise ShapeError(
                "a key/value cache needs positions ≥ 1, kv_heads ≥ 1 and an even head_dim, got"
                f" {positions}, {kv_heads} and {head_dim}"
            )
        capacity = -(-positions // SPAN) * SPAN
        keys = torch.zeros(kv_heads, capacity // LANE, head_dim, LANE, dtype=dtype)
        values = torch.zeros(kv_heads, capacity, _padded(head_dim), dtype=dtype)
        return cls(keys=keys, values=values, kv_heads=kv_heads, head_dim=head_dim, capacity=capacity)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values together."""
        return self.keys.numel() * self.keys.element_size() + self.values.numel() * self.values.element_size()

    def pointers(self) -> tuple[int, int, int, int, int, int]:
        """Return what the native functions take for a cache."""
        code = DTYPE_CODES[self.keys.dtype]
        return self.keys.data_ptr(), self.values.data_ptr(), code, self.kv_heads, self.head_dim, self.capacity


def _padded(head_dim: int) -> int:
    return -(-head_dim // LANE) * LANE


def _native() -> ModuleType:
    if native.NATIVE is None:
        raise KernelError(str(native.UNAVAILABLE))
    return native.NATIVE


def _check(tensor: Tensor, name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype] = (torch.float32,)) -> None:
    if tensor.dtype not in dtypes:
        raise DtypeError(f"{name} must be {' or '.join(str(dtype) for dtype in dtypes)}, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ShapeError(f"{name} must be contiguous and on the CPU, got {tensor.device}; call .cpu().contiguous()")


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


def _step(kind: StepKind, holds: tuple[Tensor, ...], function: Callable[..., None], *arguments: float) -> Step:
    run = functools.partial(function, native.level(), native.num_threads(), *arguments)
    run.__dict__["holds"] = holds
    return Step(kind=kind, run=run)


def prepare_norm(
    residual: Float[Tensor, "rows cols"],
    added: Float[Tensor, "rows cols"] | None,
    weight: Float[Tensor, "cols"],
    out: Float[Tensor, "rows cols"],
    eps: float,
) -> Step:
    """Prepare residual += added (where given), then out = residual / sqrt(mean(residual²) + eps) · weight by rows.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together.
    """
    rows, cols = residual.shape
    _check(residual, "residual", (rows, cols))
    _check(out, "out", (rows, cols))
    _check(weight, "weight", (cols,))
    if added is not None:
        _check(added, "added", (rows, cols))
    return _step(
        StepKind.NORM,
        _present(residual, added, weight, out),
        _native().add_rms_norm,
        residual.data_ptr(),
        _pointer(added),
        weight.data_ptr(),
        out.data_ptr(),
        rows,
        cols,
        eps,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Cosines and sines [positions, head_dim] of the rotary embedding, and the norms of query and key heads."""

    cosines: Tensor
    sines: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    eps: float = 0.0


def prepare_heads(
    heads: Float[Tensor, "rows width"], first: Int[Tensor, "1"], cache: KeyValueCache, rotation: Rotation
) -> Step:
    """Prepare: norm (where given) and rotation of queries and keys, keys and values into the cache.

    A row of ``heads`` holds the queries, then the keys, then the values, each [heads, head_dim]; the queries are
    changed in place. Row t stands at position first + t, which must lie below the capacity.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together.
    """
    rows, width = heads.shape
    num_heads = width // cache.head_dim - 2 * cache.kv_heads
    _check(heads, "heads", (rows, (num_heads + 2 * cache.kv_heads) * cache.head_dim))
    if num_heads < 1 or num_heads % cache.kv_heads:
        raise ShapeError(f"{num_heads} query heads cannot share {cache.kv_heads} key/value heads evenly")
    _check(first, "first", (1,), (torch.int64,))
    _check(rotation.cosines, "cosines", (cache.capacity, cache.head_dim))
    _check(rotation.sines, "sines", (cache.capacity, cache.head_dim))
    for name, norm in (("query_norm", rotation.query_norm), ("key_norm", rotation.key_norm)):
        if norm is not None:
            _check(norm, name, (cache.head_dim,))
    held = _present(
        heads,
        first,
        cache.keys,
        cache.values,
        rotation.cosines,
        rotation.sines,
        rotation.query_norm,
        rotation.key_norm,
    )
    return _step(
        StepKind.ATTENTION,
        held,
        _native().store_heads,
        *cache.pointers(),
        heads.data_ptr(),
        rows,
        num_heads,
        first.data_ptr(),
        rotation.cosines.data_ptr(),
        rotation.sines.data_ptr(),
        _pointer(rotation.query_norm),
        _pointer(rotation.key_norm),
        rotation.eps,
    )


def attention_scratch(num_heads: int, cache: KeyValueCache) -> Float[Tensor, "floats"]:
    """Return the memory that attention of one query needs beside its output."""
    splits = -(-cache.capacity // SPLIT)
    return torch.empty(num_heads * splits * (_padded(cache.head_dim) + 2), dtype=torch.float32)


def prepare_attention(
    heads: Float[Tensor, "rows width"],
    first: Int[Tensor, "1"],
    cache: KeyValueCache,
    out: Float[Tensor, "rows heads_out"],
    scratch: Float[Tensor, "floats"],
    *,
    scale: float,
    window: int | None,
) -> Step:
    """Prepare out = softmax(q Kᵀ scale) V over the cached positions up to each row's own, the row's own included.

    ``window`` limits a row to its last so many positions. ``heads`` is as :func:`prepare_heads` leaves it,
    ``scratch`` as :func:`attention_scratch` makes it. Weights below 2.5e-38 of the largest count as 0.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together.
    """
    rows, width = heads.shape
    num_heads = width // cache.head_dim - 2 * cache.kv_heads
    _check(heads, "heads", (rows, (num_heads + 2 * cache.kv_heads) * cache.head_dim))
    _check(first, "first", (1,), (torch.int64,))
    _check(out, "out", (rows, num_heads * cache.head_dim))
    _check(scratch, "scratch", tuple(attention_scratch(num_heads, cache).shape))
    if window is not None and window < 1:
        raise ShapeError(f"a sliding window has at least one position, got {window}")
    return _step(
        StepKind.ATTENTION,
        (heads, first, cache.keys, cache.values, out, scratch),
        _native().attend,
        *cache.pointers(),
        heads.data_ptr(),
        width,
        out.data_ptr(),
        rows,
        num_heads,
        first.data_ptr(),
        window or 0,
        scale,
        scratch.data_ptr(),
    )


def prepare_gate(pairs: Float[Tensor, "rows twice_cols"], out: Float[Tensor, "rows cols"], gate: Gate) -> Step:
    """Prepare out = act(pairs[:, :cols]) · pairs[:, cols:], with the sigmoid form of SiLU or of the tanh GELU.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together.
    """
    rows, cols = out.shape
    _check(pairs, "pairs", (rows, 2 * cols))
    _check(out, "out", (rows, cols))
    return _step(
        StepKind.LINEAR,
        (pairs, out),
        _native().gate,
        pairs.data_ptr(),
        out.data_ptr(),
        rows,
        cols,
        _GATE_CODES[gate],
    )


def prepare_dense_linear(
    inputs: Float[Tensor, "rows cols"],
    weight: Float[Tensor, "out_cols cols"],
    bias: Float[Tensor, "out_cols"] | None,
    out: Float[Tensor, "rows out_cols"],
) -> Step:
    """Prepare out = inputs weightᵀ + bias for few rows: weights of float32 or bfloat16, read once for four rows.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together.
    """
    rows, cols = inputs.shape
    out_cols = out.shape[1]
    _check(inputs, "inputs", (rows, cols))
    _check(weight, "weight", (out_cols, cols), tuple(DTYPE_CODES))
    _check(out, "out", (rows, out_cols))
    if bias is not None:
        _check(bias, "bias", (out_cols,))
    return _step(
        StepKind.LINEAR,
        _present(inputs, weight, bias, out),
        _native().dense_linear,
        inputs.data_ptr(),
        weight.data_ptr(),
        DTYPE_CODES[weight.dtype],
        _pointer(bias),
        out.data_ptr(),
        rows,
        cols,
        out_cols,
    )


def largest_index(numbers: Float[Tensor, "count"]) -> int:
    """Return the index of the first largest number, of the first NaN where there is one.

    Raises:
        ShapeError, DtypeError: empty, or not a contiguous float32 vector.
    """
    _check(numbers, "numbers", (numbers.numel(),))
    if not numbers.numel():
        raise ShapeError("an empty vector has no largest number")
    return int(_native().largest_index(native.level(), numbers.data_ptr(), numbers.numel()))
