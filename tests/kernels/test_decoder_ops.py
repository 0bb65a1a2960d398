"""The operations of a decoder against float64, on every backend, at every level and number of threads.

Bounds: u = 2^-24 is half a step of float32. A sum of n products carries at most (n + 1) u of the sum of magnitudes; the
exponential carries 4 u (tested on its own); each further operation adds one u.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernel_levels import LEVELS
from microscale.errors import DtypeError, KernelError, ShapeError
from microscale.formats import parse_format
from microscale.kernels import (
    Combine,
    Gate,
    KeyValueCache,
    Rotation,
    WeightGroup,
    dispatch,
    fake_quantize,
    largest_index,
    linear,
    make_cache,
    quantize,
    silu_mul,
    to_layout,
    why_not,
)
from microscale.kernels.backend import Backend
from microscale.kernels.cpu import native
from microscale.kernels.decoder_ops import (
    add_rms_norm,
    as_cached,
    attend,
    gate,
    linear_dense,
    linear_group,
    store_heads,
)
from microscale.kernels.plan import bind, run
from small_models import same_bits

U = 2.0**-24
EXPONENTIAL = 4 * U
SPAN = 64
"""Positions that one piece of attention covers, on the CPU; a plain softmax has fewer roundings."""
ALL = [
    (backend, level)
    for backend in dispatch.BACKENDS
    if not backend.unavailable()
    for level in (LEVELS if backend.level() is not None else [""])
]


@pytest.fixture(params=ALL, ids=[f"{backend.name}-{level}" for backend, level in ALL], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The only backend of the test."""
    chosen, level = request.param
    monkeypatch.setattr(dispatch, "BACKENDS", [chosen])
    if not level:
        yield chosen
        return
    with native.use_level(level):
        yield chosen


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 256), (3, 67), (5, 1536), (0, 8)])
@pytest.mark.parametrize("with_added", [True, False])
def test_norm_and_residual(rows: int, cols: int, with_added: bool) -> None:
    before, added, weight = randn(rows, cols), randn(rows, cols, seed=1) * 3, randn(cols, seed=2)
    residual, out = before.clone(), torch.empty(rows, cols)
    run(add_rms_norm(residual, added if with_added else None, weight, 1e-5, out))
    assert same_bits(residual, before + added if with_added else before)
    exact = residual.double()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    # half the relative error of the mean of squares, then square root, reciprocal and two products
    assert bool(((out.double() - expected).abs() <= (cols / 2 + 6) * U * expected.abs()).all())


def test_norm_of_nan_and_zero_rows() -> None:
    residual = torch.stack([torch.zeros(40), torch.full((40,), 2.0), torch.full((40,), math.nan)])
    out = torch.empty_like(residual)
    run(add_rms_norm(residual, None, torch.ones(40), 0.25, out))
    assert (
        out[0].eq(0).all() and torch.allclose(out[1], torch.full((40,), 2 / math.sqrt(4.25))) and out[2].isnan().all()
    )


@pytest.mark.parametrize("kind", list(Gate))
@pytest.mark.parametrize(("rows", "cols"), [(1, 5), (2, 96), (3, 4099)])
def test_gates(kind: Gate, rows: int, cols: int) -> None:
    pairs, out = randn(rows, 2 * cols) * 8, torch.empty(rows, cols)
    pairs[0, :4] = torch.tensor([-100.0, 100.0, -0.0, 0.0])
    run(gate(pairs, out, kind))
    x, y = pairs.double()[:, :cols], pairs.double()[:, cols:]
    z = x if kind is Gate.SILU else 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    expected = x * torch.sigmoid(z) * y
    # an error of 5 u in z moves the sigmoid by up to 5 u |z|; then the exponential, a sum, a quotient, a product
    bound = (EXPONENTIAL + 4 * U + 5 * U * z.abs()) * expected.abs() + 1e-36 * (1 + (x * y).abs())
    assert bool(((out.double() - expected).abs() <= bound).all())


def rotation(capacity: int, head_dim: int, *, norms: bool) -> Rotation:
    angles = torch.arange(capacity)[:, None] * 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.cat([angles, angles], -1)
    return Rotation(
        cosines=angles.cos().contiguous(),
        sines=angles.sin().contiguous(),
        query_norm=randn(head_dim, seed=8) if norms else None,
        key_norm=randn(head_dim, seed=9) if norms else None,
        eps=1e-6,
    )


def turned(x: Tensor, norm: Tensor | None, rotation: Rotation, first: int) -> tuple[Tensor, Tensor]:
    """The rotated heads [rows, heads, head_dim] in float64, and the sum of the magnitudes that make up each."""
    x = x.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + rotation.eps).sqrt() * norm.double()
    half = x.shape[-1] // 2
    swapped = torch.cat([-x[..., half:], x[..., :half]], -1)
    cosines = rotation.cosines.double()[first : first + x.shape[0], None]
    sines = rotation.sines.double()[first : first + x.shape[0], None]
    return x * cosines + swapped * sines, (x * cosines).abs() + (swapped * sines).abs()


def new_cache(positions: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, first: int = 0) -> KeyValueCache:
    return make_cache(dtype, positions=positions, kv_heads=kv_heads, head_dim=head_dim, length=torch.tensor([first]))


def contents(backend: Backend, cache: KeyValueCache) -> tuple[Tensor, Tensor]:
    """Keys and values [kv_heads, capacity, head_dim]."""
    assert backend.cache_layout is not None and backend.cache_layout.name == cache.layout
    return backend.cache_layout.read(cache)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(
    ("rows", "first", "head_dim"), [(1, 0, 64), (1, 37, 10), (45, 13, 64), (16, 16, 128), (0, 5, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads(backend: Backend, rows: int, first: int, head_dim: int, norms: bool, dtype: torch.dtype) -> None:
    cache = new_cache(100, 2, head_dim, dtype, first=first)
    turn = rotation(cache.capacity, head_dim, norms=norms)
    before = randn(rows, 10 * head_dim) * 2
    heads = before.clone()
    run(store_heads(heads, cache, turn))
    split = before.reshape(rows, 10, head_dim)
    bound = (3 + (head_dim / 2 + 6 if norms else 0)) * U
    queries, magnitude = turned(split[:, :6], turn.query_norm, turn, first)
    assert bool(((heads.reshape(rows, 10, head_dim)[:, :6] - queries).abs() <= bound * magnitude).all())
    keys, magnitude = turned(split[:, 6:8], turn.key_norm, turn, first)
    all_keys, all_values = contents(backend, cache)
    stored = all_keys[:, first : first + rows].transpose(0, 1).double()
    step = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    assert bool(((stored - keys).abs() <= bound * magnitude + step * keys.abs() + 1e-30).all())
    assert same_bits(all_values[:, first : first + rows], split[:, 8:].transpose(0, 1).to(dtype))
    untouched = torch.ones(cache.capacity, dtype=torch.bool)
    untouched[first : first + rows] = False
    assert all_keys[:, untouched].eq(0).all() and all_values[:, untouched].eq(0).all()
    assert cache.values[..., head_dim:].eq(0).all()  # the padding, where there is some


@pytest.mark.parametrize("stored", ["bfloat16", "mxfp8"])
def test_a_cache_holds_what_the_emulation_of_one_rounds_to(backend: Backend, stored: str) -> None:
    kind = torch.bfloat16 if stored == "bfloat16" else parse_format(stored)
    if backend.name != "reference" and stored == "mxfp8":
        with pytest.raises(KernelError, match="keeps keys and values in float32 or bfloat16 only"):
            make_cache(kind, positions=4, kv_heads=2, head_dim=64, length=torch.tensor([0]))
        return
    cache = make_cache(kind, positions=4, kv_heads=2, head_dim=64, length=torch.tensor([1]))
    heads = randn(3, 6 * 64) * 5
    still = Rotation(cosines=torch.ones(cache.capacity, 64), sines=torch.zeros(cache.capacity, 64))
    run(store_heads(heads.clone(), cache, still))
    keys, values = (table[:, 1:4].float().transpose(0, 1) for table in contents(backend, cache))
    split = heads.reshape(3, 6, 64)
    expected = as_cached(split, kind, "heads") if isinstance(kind, torch.dtype) else fake_quantize(split, kind)
    assert torch.equal(keys, expected[:, 2:4]) and torch.equal(values, expected[:, 4:])
    assert bool((expected != split).any())


def filled_cache(positions: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> KeyValueCache:
    """A cache of random numbers, which come in through the operation: angles of zero turn nothing."""
    cache = new_cache(positions, kv_heads, head_dim, dtype)
    still = Rotation(cosines=torch.ones(cache.capacity, head_dim), sines=torch.zeros(cache.capacity, head_dim))
    run(store_heads(randn(cache.capacity, 3 * kv_heads * head_dim, seed=3), cache, still))
    return cache


def attended(
    backend: Backend, heads: Tensor, cache: KeyValueCache, first: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention in float64, and the bound of its error in float32."""
    rows, dim = heads.shape[0], cache.head_dim
    queries = heads.reshape(rows, heads.shape[1] // dim, dim)[:, : -2 * cache.kv_heads].double()
    group = queries.shape[1] // cache.kv_heads
    keys, values = (table.double().repeat_interleave(group, 0) for table in contents(backend, cache))
    scores = torch.einsum("rhd,hpd->hrp", queries, keys) * scale
    places, own = torch.arange(cache.capacity)[None], first + torch.arange(rows)[:, None]
    hidden = places > own
    if window is not None:
        hidden |= places <= own - window
    scores = scores.masked_fill(hidden, -math.inf)
    weights = scores.softmax(-1)
    out = torch.einsum("hrp,hpd->rhd", weights, values)
    # A score is off by delta, so is the maximum; an exponential by its own error and that of its argument. Numerator
    # and denominator are both off by as much, and both are sums of up to `capacity` terms with rescaled spans.
    delta = (dim + 3) * U * (torch.einsum("rhd,hpd->hrp", queries.abs(), keys.abs()) * scale).masked_fill(hidden, 0)
    spread = (scores.amax(-1) - scores.masked_fill(hidden, math.inf).amin(-1)) * U
    spans = cache.capacity // SPAN + 2
    relative = delta.amax(-1) + 2 * spread + (spans + 1) * EXPONENTIAL + (cache.capacity + spans + 2) * U
    bound = 2 * relative.T[..., None] * torch.einsum("hrp,hpd->rhd", weights, values.abs()) + 1e-30
    return out.flatten(1), bound.flatten(1)


CASES = [  # rows, first, heads, kv_heads, head_dim, window
    (1, 0, 4, 4, 64, None),
    (1, 63, 12, 4, 128, None),
    (1, 1300, 12, 4, 32, None),
    (1, 1300, 30, 2, 24, 700),
    (1, 530, 2, 1, 16, 3),
    (2, 100, 3, 1, 8, None),
    (70, 0, 6, 2, 64, None),
    (70, 61, 6, 2, 80, 40),
    (33, 200, 5, 5, 20, 1),
    (7, 9, 26, 1, 272, None),
    (0, 4, 4, 4, 64, None),
]


def attention(
    backend: Backend, case: tuple[int, int, int, int, int, int | None], dtype: torch.dtype, threads: int
) -> tuple[Tensor, ...]:
    rows, first, num_heads, kv_heads, head_dim, window = case
    cache = filled_cache(first + max(rows, 1), kv_heads, head_dim, dtype)
    heads = randn(rows, (num_heads + 2 * kv_heads) * head_dim, seed=5)
    out = torch.full((rows, num_heads * head_dim), math.nan)
    scale = head_dim**-0.5
    cache.length.fill_(first)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run(attend(heads, cache, out, scale=scale, window=window))
    finally:
        torch.set_num_threads(before)
    return out, *attended(backend, heads, cache, first, scale, window)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(backend: Backend, case: tuple[int, int, int, int, int, int | None], dtype: torch.dtype) -> None:
    out, expected, bound = attention(backend, case, dtype, 1)
    assert bool(((out.double() - expected).abs() <= bound).all())
    for threads in (2, 3) if backend.bind is not None else ():
        assert same_bits(attention(backend, case, dtype, threads)[0], out)


def test_attention_of_large_scores_stays_finite_and_nan_shows(backend: Backend) -> None:
    cache = filled_cache(200, 1, 16, torch.float32)
    heads = torch.cat([randn(1, 16) * 1e4, torch.zeros(1, 32)], 1)
    out = torch.empty(1, 16)
    cache.length.fill_(199)
    plan = bind([attend(heads, cache, out, scale=1.0, window=None)])
    plan.run()
    keys, values = contents(backend, cache)
    assert torch.allclose(out[0], values[0, int((keys[0, :200] @ heads[0, :16]).argmax())])
    still = Rotation(cosines=torch.ones(cache.capacity, 16), sines=torch.zeros(cache.capacity, 16))
    cache.length.fill_(150)
    run(
        store_heads(torch.cat([torch.zeros(1, 16), torch.full((1, 16), math.nan), torch.zeros(1, 16)], 1), cache, still)
    )
    cache.length.fill_(199)
    plan.run()
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("rows", "cols", "out_cols"), [(1, 64, 256), (1, 67, 33), (4, 1536, 35), (7, 13, 3), (2, 16, 1), (9, 32, 2100)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_plain_linear(rows: int, cols: int, out_cols: int, dtype: torch.dtype, with_bias: bool) -> None:
    inputs, weight = randn(rows, cols), randn(out_cols, cols, seed=1).to(dtype)
    bias = randn(out_cols, seed=2) if with_bias else None
    out = torch.empty(rows, out_cols)
    run(linear_dense(inputs, weight, bias, out))
    expected = inputs.double() @ weight.double().T
    magnitude = inputs.double().abs() @ weight.double().abs().T
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    assert bool(((out.double() - expected).abs() <= (cols + 2) * U * magnitude).all())


@pytest.mark.parametrize("activations", [None, "mxfp8", "mxfp4"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("combine", list(Combine))
def test_weights_that_share_their_input(
    backend: Backend, combine: Combine, rows: int, activations: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of linear for each, then those of silu_mul within its bound."""
    fmt = None if activations is None else parse_format(activations)
    layout = backend.wanted_layout(parse_format("mxfp4"), (40, 96), torch.float32, torch.device("cpu")) or "row_major"
    with monkeypatch.context() as all_backends:
        all_backends.setattr(dispatch, "BACKENDS", [backend for backend, _ in ALL])
        weights = [to_layout(quantize(randn(40, 96, seed=seed), "mxfp4"), layout) for seed in (1, 2)]
    inputs, biases = randn(rows, 96), [randn(40, seed=3), None]
    group = WeightGroup(weights=tuple(weights), biases=tuple(biases), activations=fmt, combine=combine)
    out = torch.empty(rows, 40 if combine is Combine.SILU_MUL else 80)
    run(linear_group(inputs, group, out))
    first, second = (linear(inputs, w, b, activations=fmt) for w, b in zip(weights, biases, strict=True))
    if combine is Combine.CONCATENATE:
        assert same_bits(out, torch.cat([first, second], 1))
    else:
        exact = first.double() * torch.sigmoid(first.double()) * second.double()
        assert bool(((out.double() - exact).abs() <= 8 * U * exact.abs()).all())
        assert torch.allclose(out, silu_mul(first, second), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 7, 64, 1001])
def test_the_first_largest_number(count: int) -> None:
    numbers = randn(count)
    assert largest_index(numbers) == int(numbers.argmax())
    numbers[count // 2 :] = 50.0
    assert largest_index(numbers) == count // 2
    assert largest_index(torch.full((count,), -math.inf)) == 0
    numbers[count // 3] = numbers[count - 1] = math.nan
    assert largest_index(numbers) == count // 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_operands_round_once_or_are_refused(backend: Backend, dtype: torch.dtype) -> None:
    residual, added, out = randn(2, 48).to(dtype), randn(2, 48, seed=1).to(dtype), torch.empty(2, 48, dtype=dtype)
    call = add_rms_norm(residual, added, torch.ones(48), 1e-5, out)
    if backend.name != "reference":
        assert why_not(call.requests[0]) == {backend.name: f"computes add_rms_norm in float32 only, not {dtype}"}
        return
    expected = residual + added
    run(call)
    assert same_bits(residual, expected)
    exact = expected.double() / (expected.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert bool(((out.double() - exact).abs() <= 1.01 * step * exact.abs()).all())


def test_what_is_refused() -> None:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(DtypeError, match=r"out must be torch\.float32, got torch\.float64"):
        add_rms_norm(x, None, weight, 1e-6, x.double())
    with pytest.raises(ShapeError, match=r"weight must have shape \[8\], got \[2, 4\]"):
        add_rms_norm(x, None, weight.reshape(2, 4), 1e-6, x)
    with pytest.raises(ShapeError, match="contiguous"):
        add_rms_norm(torch.zeros(8, 2).T, None, weight, 1e-6, x)
    with pytest.raises(ShapeError, match="even head_dim"):
        new_cache(4, 1, 7, torch.float32)
    with pytest.raises(DtypeError, match="length"):
        make_cache(torch.float32, positions=4, kv_heads=1, head_dim=8, length=torch.tensor([0.0]))
    cache = new_cache(4, 2, 8, torch.float32)
    turn = rotation(cache.capacity, 8, norms=False)
    with pytest.raises(ShapeError, match="cannot share"):
        store_heads(torch.zeros(1, 7 * 8), cache, turn)
    with pytest.raises(ShapeError, match="cosines must have shape"):
        store_heads(torch.zeros(1, 8 * 8), cache, rotation(cache.capacity + 1, 8, norms=False))
    with pytest.raises(ShapeError, match="window"):
        attend(torch.zeros(1, 64), cache, torch.zeros(1, 32), scale=1, window=0)
    with pytest.raises(ShapeError, match="empty"):
        largest_index(torch.zeros(0))
    packed = quantize(torch.ones(4, 32), "mxfp4")
    with pytest.raises(ShapeError, match=r"inputs must have shape \[1, 32\]"):
        linear_group(torch.zeros(1, 64), WeightGroup(weights=(packed,), biases=(None,)), torch.zeros(1, 4))
    with pytest.raises(ShapeError, match="one width"):
        WeightGroup(weights=(packed, quantize(torch.ones(4, 64), "mxfp4")), biases=(None, None))
    with pytest.raises(ShapeError, match="silu_mul takes two"):
        WeightGroup(weights=(packed,), biases=(None,), combine=Combine.SILU_MUL)
    with pytest.raises(ShapeError, match=r"is \[4\], got \[3\]"):
        WeightGroup(weights=(packed,), biases=(torch.ones(3),))


def test_a_cache_that_nobody_keeps_is_refused_with_all_reasons(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("it keeps all")
    with pytest.raises(
        KernelError, match=f"no backend keeps keys and values in torch.float16 on cpu:\n  {backend.name}"
    ):
        new_cache(4, 1, 8, torch.float16)
