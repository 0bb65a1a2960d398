"""The operations of a decoder by the compiled kernels: each call becomes one prepared native call without checks.

A ``_prepare_…`` function takes the operands of a call, which :mod:`microscale.kernels.decoder_ops` has checked, and
returns the function that runs it. That function holds the operands, so that their memory stays as long as it can be
called; level and number of threads are those of the moment it was prepared.

The layout ``lanes16`` of a cache, with P = head_dim rounded up to 16: ``keys`` [kv_heads, capacity / 16, head_dim, 16]
with 16 positions side by side, so that a score needs no sum over lanes, ``values`` [kv_heads, capacity, P]. Padding
holds zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from microscale.formats import SegmentedFormat
from microscale.kernels.backend import Call, Operation, PlanStep, Request
from microscale.kernels.cpu import enums, native
from microscale.kernels.cpu.enums import DTYPES
from microscale.kernels.cpu.linear import LinearCall, linear_refusal, prepare_linear, prepare_segments
from microscale.kernels.operands import CacheLayout, Gate, KeyValueCache, Rotation, WeightGroup

NAME = "cpu"
"""The name of the backend."""
LANE = 16
"""Positions that lie side by side in the cache of keys."""
SPAN = 64
"""Every capacity is a multiple of this many positions, over which attention goes in one piece."""
SPLIT = 512
"""A single query shares its positions out in pieces of this many."""
FEW_ROWS = 8
"""Up to so many rows the dense linear kernel is taken; from then on torch's matrix product is faster."""
CAST_ROWS = 2048
"""Rows of a bfloat16 weight that are cast to float32 at a time for a product with many rows."""

_STORED = (torch.float32, torch.bfloat16)

Run = Callable[[], None]


def _padded(head_dim: int) -> int:
    return -(-head_dim // LANE) * LANE


def _allocate(
    capacity: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    keys = torch.zeros(kv_heads, capacity // LANE, head_dim, LANE, dtype=dtype, device=device)
    return keys, torch.zeros(kv_heads, capacity, _padded(head_dim), dtype=dtype, device=device)


def _read(cache: KeyValueCache) -> tuple[Tensor, Tensor]:
    keys = cache.keys.permute(0, 1, 3, 2).reshape(cache.kv_heads, cache.capacity, cache.head_dim)
    return keys, cache.values[..., : cache.head_dim]


CACHE = CacheLayout(name="lanes16", span=SPAN, allocate=_allocate, read=_read)


def decoder_refusal(request: Request) -> str | None:
    """Return why an operation of a decoder cannot run here, or None where it can."""
    if request.dtype != torch.float32:
        return f"computes {request.operation.value} in float32 only, not {request.dtype}"
    if request.operation is Operation.LINEAR_GROUP:
        if request.group_size > 1 and isinstance(request.format, SegmentedFormat):
            return "gives a weight of segments a call of its own"
        return linear_refusal(request.layout, request.format, request.activations)
    if request.operation in (Operation.STORE_HEADS, Operation.ATTEND):
        if request.layout != CACHE.name:
            return f"reads caches in the layout {CACHE.name} only, not {request.layout}"
        if request.stored not in _STORED:
            return f"keeps keys and values in float32 or bfloat16 only, not {request.stored or request.format}"
    return None


def _prepared(holds: tuple[Any, ...], function: Callable[..., None], *arguments: Any) -> Run:
    run = functools.partial(function, native.level(), native.num_threads(), *arguments)
    run.__dict__["holds"] = holds
    return run


def _native() -> Any:
    assert native.NATIVE is not None
    return native.NATIVE


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _cache_record(cache: KeyValueCache) -> Any:
    return _native().KeyValueCache(
        keys=cache.keys.data_ptr(),
        values=cache.values.data_ptr(),
        dtype=DTYPES[cache.keys.dtype],
        kv_heads=cache.kv_heads,
        head_dim=cache.head_dim,
        capacity=cache.capacity,
    )


def _prepare_norm(residual: Tensor, added: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Run:
    pointers = residual.data_ptr(), _pointer(added), weight.data_ptr(), out.data_ptr()
    return _prepared((residual, added, weight, out), _native().add_rms_norm, *pointers, *residual.shape, eps)


def _prepare_heads(heads: Tensor, cache: KeyValueCache, rotation: Rotation) -> Run:
    rows, width = heads.shape
    call = _native().HeadsCall(
        cache=_cache_record(cache),
        heads=heads.data_ptr(),
        rows=rows,
        num_heads=width // cache.head_dim - 2 * cache.kv_heads,
        first=cache.length.data_ptr(),
        cosines=rotation.cosines.data_ptr(),
        sines=rotation.sines.data_ptr(),
        query_norm=_pointer(rotation.query_norm),
        key_norm=_pointer(rotation.key_norm),
        eps=rotation.eps,
    )
    return _prepared((heads, cache, rotation), _native().store_heads, call)


def _scratch_size(cache: KeyValueCache, out: Tensor) -> int:
    """Return how many floats attention of one query needs beside its output."""
    num_heads, splits = out.shape[1] // cache.head_dim, -(-cache.capacity // SPLIT)
    return num_heads * splits * (_padded(cache.head_dim) + 2)


def _prepare_attention(
    heads: Tensor, cache: KeyValueCache, out: Tensor, scale: float, window: int | None, scratch: Tensor | None = None
) -> Run:
    if scratch is None:
        scratch = torch.empty(_scratch_size(cache, out), dtype=torch.float32)
    rows, width = heads.shape
    call = _native().AttentionCall(
        cache=_cache_record(cache),
        queries=heads.data_ptr(),
        stride=width,
        out=out.data_ptr(),
        rows=rows,
        num_heads=out.shape[1] // cache.head_dim,
        first=cache.length.data_ptr(),
        window=window or 0,
        scale=scale,
        scratch=scratch.data_ptr(),
    )
    return _prepared((heads, cache, out, scratch), _native().attend, call)


def _prepare_gate(pairs: Tensor, out: Tensor, kind: Gate) -> Run:
    return _prepared((pairs, out), _native().gate, pairs.data_ptr(), out.data_ptr(), *out.shape, enums.Gate[kind.name])


def _prepare_dense(inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Run:
    if inputs.shape[0] > FEW_ROWS:
        return functools.partial(_dense_many_rows, inputs, weight, bias, out)
    return _prepared(
        (inputs, weight, bias, out),
        _native().dense_linear,
        inputs.data_ptr(),
        weight.data_ptr(),
        DTYPES[weight.dtype],
        _pointer(bias),
        out.data_ptr(),
        *inputs.shape,
        out.shape[1],
    )


def _dense_many_rows(inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    for begin in range(0, weight.shape[0], CAST_ROWS):
        part = slice(begin, begin + CAST_ROWS)
        added = None if bias is None else bias[part]
        out[:, part] = functional.linear(inputs, weight[part].to(torch.float32), added)


def _prepare_group(inputs: Tensor, group: WeightGroup, out: Tensor) -> Run:
    call: LinearCall | None = group.prepared.get(NAME)
    if call is None:
        if isinstance(group.weights[0].format, SegmentedFormat):
            call = prepare_segments(group.weights[0], group.activations, group.biases[0])
        else:
            call = prepare_linear(group.weights, group.biases, group.activations, group.combine)
        group.prepared[NAME] = call
    run = functools.partial(call.run_pointers, inputs.data_ptr(), inputs.shape[0], out.data_ptr())
    run.__dict__["holds"] = (inputs, group, out)
    return run


def largest_index(numbers: Float[Tensor, "count"]) -> int:
    """See :func:`microscale.kernels.decoder_ops.largest_index`."""
    return int(_native().largest_index(native.level(), numbers.data_ptr(), numbers.numel()))


_PREPARE: Mapping[Operation, Callable[..., Run]] = {
    Operation.ADD_RMS_NORM: _prepare_norm,
    Operation.STORE_HEADS: _prepare_heads,
    Operation.ATTEND: _prepare_attention,
    Operation.GATE: _prepare_gate,
    Operation.LINEAR_DENSE: _prepare_dense,
    Operation.LINEAR_GROUP: _prepare_group,
}


def _at_once(prepare: Callable[..., Run]) -> Callable[..., None]:
    def run(*arguments: Any) -> None:
        prepare(*arguments)()

    return run


IMPLEMENTATIONS: dict[Operation, Callable[..., Any]] = {
    **{operation: _at_once(prepare) for operation, prepare in _PREPARE.items()},
    Operation.LARGEST_INDEX: largest_index,
}


def bind(calls: Sequence[Call]) -> list[PlanStep]:
    """Prepare one step for each call; all attention among them shares its scratch memory."""
    sizes = [_scratch_size(*call.arguments[1:3]) for call in calls if call.operation is Operation.ATTEND]
    scratch = torch.empty(max(sizes, default=0), dtype=torch.float32)
    steps: list[PlanStep] = []
    for call in calls:
        beside = (scratch,) if call.operation is Operation.ATTEND else ()
        run = _PREPARE[call.operation](*call.arguments, *beside)
        steps.append(PlanStep(kinds=(call.kind,), run=run, calls=(call,)))
    return steps
