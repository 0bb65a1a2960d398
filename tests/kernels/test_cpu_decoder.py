"""Norms, heads, attention, gates and the plain linear layer against float64, at every level and number of threads.

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
from microscale.kernels.cpu import decoder, native
from small_models import same_bits

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason="the compiled kernels are not installed")

U = 2.0**-24
EXPONENTIAL = 4 * U


@pytest.fixture(params=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_level(request.param):
        yield request.param


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exponential(x: Tensor) -> Tensor:
    assert native.NATIVE is not None
    out = torch.empty_like(x)
    native.NATIVE.exponential(native.level(), x.data_ptr(), out.data_ptr(), x.numel())
    return out


def test_the_exponential() -> None:
    x = torch.cat([torch.linspace(-87.3, 88.72, 200_003), torch.tensor([0.0, -0.0])])
    exact = x.double().exp()
    assert float(((exponential(x).double() - exact) / exact).abs().max()) <= EXPONENTIAL
    x = torch.linspace(-110, -87, 20_003)
    assert float((exponential(x).double() - x.double().exp()).abs().max()) <= 2.0**-149  # a subnormal's step
    special = exponential(torch.tensor([-math.inf, -1e30, -105.0, 88.8, 1e30, math.inf, math.nan]))
    assert special[:6].tolist() == [0.0, 0.0, 0.0, math.inf, math.inf, math.inf] and special[6].isnan()


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 256), (3, 67), (5, 1536), (0, 8)])
@pytest.mark.parametrize("with_added", [True, False])
def test_norm_and_residual(rows: int, cols: int, with_added: bool) -> None:
    before, added, weight = randn(rows, cols), randn(rows, cols, seed=1) * 3, randn(cols, seed=2)
    residual, out = before.clone(), torch.empty(rows, cols)
    decoder.prepare_norm(residual, added if with_added else None, weight, out, 1e-5).run()
    assert same_bits(residual, before + added if with_added else before)
    exact = residual.double()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    # half the relative error of the mean of squares, then square root, reciprocal and two products
    assert bool(((out.double() - expected).abs() <= (cols / 2 + 6) * U * expected.abs()).all())


def test_norm_of_nan_and_zero_rows() -> None:
    residual = torch.stack([torch.zeros(40), torch.full((40,), 2.0), torch.full((40,), math.nan)])
    out = torch.empty_like(residual)
    decoder.prepare_norm(residual, None, torch.ones(40), out, 0.25).run()
    assert (
        out[0].eq(0).all() and torch.allclose(out[1], torch.full((40,), 2 / math.sqrt(4.25))) and out[2].isnan().all()
    )


@pytest.mark.parametrize("gate", list(decoder.Gate))
@pytest.mark.parametrize(("rows", "cols"), [(1, 5), (2, 96), (3, 4099)])
def test_gates(gate: decoder.Gate, rows: int, cols: int) -> None:
    pairs, out = randn(rows, 2 * cols) * 8, torch.empty(rows, cols)
    pairs[0, :4] = torch.tensor([-100.0, 100.0, -0.0, 0.0])
    decoder.prepare_gate(pairs, out, gate).run()
    x, y = pairs.double()[:, :cols], pairs.double()[:, cols:]
    z = x if gate is decoder.Gate.SILU else 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    expected = x * torch.sigmoid(z) * y
    # an error of 5 u in z moves the sigmoid by up to 5 u |z|; then the exponential, a sum, a quotient, a product
    bound = (EXPONENTIAL + 4 * U + 5 * U * z.abs()) * expected.abs() + 1e-36 * (1 + (x * y).abs())
    assert bool(((out.double() - expected).abs() <= bound).all())


def rotation(capacity: int, head_dim: int, *, norms: bool) -> decoder.Rotation:
    angles = torch.arange(capacity)[:, None] * 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.cat([angles, angles], -1)
    return decoder.Rotation(
        cosines=angles.cos().contiguous(),
        sines=angles.sin().contiguous(),
        query_norm=randn(head_dim, seed=8) if norms else None,
        key_norm=randn(head_dim, seed=9) if norms else None,
        eps=1e-6,
    )


def turned(x: Tensor, norm: Tensor | None, rotation: decoder.Rotation, first: int) -> tuple[Tensor, Tensor]:
    """The rotated heads [rows, heads, head_dim] in float64, and the sum of the magnitudes that make up each."""
    x = x.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + rotation.eps).sqrt() * norm.double()
    half = x.shape[-1] // 2
    swapped = torch.cat([-x[..., half:], x[..., :half]], -1)
    cosines = rotation.cosines.double()[first : first + x.shape[0], None]
    sines = rotation.sines.double()[first : first + x.shape[0], None]
    return x * cosines + swapped * sines, (x * cosines).abs() + (swapped * sines).abs()


def cached_keys(cache: decoder.KeyValueCache) -> Tensor:
    return cache.keys.permute(0, 1, 3, 2).reshape(cache.kv_heads, cache.capacity, cache.head_dim)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(
    ("rows", "first", "head_dim"), [(1, 0, 64), (1, 37, 10), (45, 13, 64), (16, 16, 128), (0, 5, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads(rows: int, first: int, head_dim: int, norms: bool, dtype: torch.dtype) -> None:
    cache = decoder.KeyValueCache.make(positions=100, kv_heads=2, head_dim=head_dim, dtype=dtype)
    assert cache.capacity == 128
    turn = rotation(128, head_dim, norms=norms)
    before = randn(rows, 10 * head_dim) * 2
    heads = before.clone()
    decoder.prepare_heads(heads, torch.tensor([first]), cache, turn).run()
    split = before.reshape(rows, 10, head_dim)
    bound = (3 + (head_dim / 2 + 6 if norms else 0)) * U
    queries, magnitude = turned(split[:, :6], turn.query_norm, turn, first)
    assert bool(((heads.reshape(rows, 10, head_dim)[:, :6] - queries).abs() <= bound * magnitude).all())
    keys, magnitude = turned(split[:, 6:8], turn.key_norm, turn, first)
    stored = cached_keys(cache)[:, first : first + rows].transpose(0, 1).double()
    step = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    assert bool(((stored - keys).abs() <= bound * magnitude + step * keys.abs() + 1e-30).all())
    assert same_bits(cache.values[:, first : first + rows, :head_dim], split[:, 8:].transpose(0, 1).to(dtype))
    untouched = torch.ones(128, dtype=torch.bool)
    untouched[first : first + rows] = False
    assert cached_keys(cache)[:, untouched].eq(0).all() and cache.values[:, untouched].eq(0).all()
    assert cache.values[..., head_dim:].eq(0).all()


def filled_cache(positions: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> decoder.KeyValueCache:
    cache = decoder.KeyValueCache.make(positions=positions, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    cache.keys.copy_(randn(*cache.keys.shape, seed=3))
    cache.values[..., :head_dim].copy_(randn(kv_heads, cache.capacity, head_dim, seed=4))
    return cache


def attended(
    heads: Tensor, cache: decoder.KeyValueCache, first: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention in float64, and the bound of its error in float32."""
    rows, dim = heads.shape[0], cache.head_dim
    queries = heads.reshape(rows, heads.shape[1] // dim, dim)[:, : -2 * cache.kv_heads].double()
    group = queries.shape[1] // cache.kv_heads
    keys = cached_keys(cache).double().repeat_interleave(group, 0)
    values = cache.values[..., :dim].double().repeat_interleave(group, 0)
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
    spans = cache.capacity // decoder.SPAN + 2
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


def attend(case: tuple[int, int, int, int, int, int | None], dtype: torch.dtype, threads: int) -> tuple[Tensor, ...]:
    rows, first, num_heads, kv_heads, head_dim, window = case
    cache = filled_cache(first + max(rows, 1), kv_heads, head_dim, dtype)
    heads = randn(rows, (num_heads + 2 * kv_heads) * head_dim, seed=5)
    out = torch.full((rows, num_heads * head_dim), math.nan)
    scale = head_dim**-0.5
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decoder.prepare_attention(
            heads,
            torch.tensor([first]),
            cache,
            out,
            decoder.attention_scratch(num_heads, cache),
            scale=scale,
            window=window,
        ).run()
    finally:
        torch.set_num_threads(before)
    return out, *attended(heads, cache, first, scale, window)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(case: tuple[int, int, int, int, int, int | None], dtype: torch.dtype) -> None:
    out, expected, bound = attend(case, dtype, 1)
    assert bool(((out.double() - expected).abs() <= bound).all())
    for threads in (2, 3):
        assert same_bits(attend(case, dtype, threads)[0], out)


def test_attention_of_large_scores_stays_finite_and_nan_shows() -> None:
    cache = filled_cache(200, 1, 16, torch.float32)
    heads = torch.cat([randn(1, 16) * 1e4, torch.zeros(1, 32)], 1)
    out, scratch = torch.empty(1, 16), decoder.attention_scratch(1, cache)
    step = decoder.prepare_attention(heads, torch.tensor([199]), cache, out, scratch, scale=1.0, window=None)
    step.run()
    best = int((cached_keys(cache)[0, :200] @ heads[0, :16]).argmax())
    assert torch.allclose(out[0], cache.values[0, best])
    cache.keys[0, 150 // 16, :, 150 % 16] = math.nan
    step.run()
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("rows", "cols", "out_cols"), [(1, 64, 256), (1, 67, 33), (4, 1536, 35), (7, 13, 3), (2, 16, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_plain_linear(rows: int, cols: int, out_cols: int, dtype: torch.dtype, with_bias: bool) -> None:
    inputs, weight = randn(rows, cols), randn(out_cols, cols, seed=1).to(dtype)
    bias = randn(out_cols, seed=2) if with_bias else None
    out = torch.empty(rows, out_cols)
    decoder.prepare_dense_linear(inputs, weight, bias, out).run()
    expected = inputs.double() @ weight.double().T
    magnitude = inputs.double().abs() @ weight.double().abs().T
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    assert bool(((out.double() - expected).abs() <= (cols + 2) * U * magnitude).all())


@pytest.mark.parametrize("count", [1, 7, 64, 1001])
def test_the_first_largest_number(count: int) -> None:
    numbers = randn(count)
    assert decoder.largest_index(numbers) == int(numbers.argmax())
    numbers[count // 2 :] = 50.0
    assert decoder.largest_index(numbers) == count // 2
    assert decoder.largest_index(torch.full((count,), -math.inf)) == 0
    numbers[count - 1] = math.nan
    assert decoder.largest_index(numbers) == count - 1


def test_what_is_refused() -> None:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(DtypeError, match=r"out must be torch\.float32, got torch\.float64"):
        decoder.prepare_norm(x, None, weight, x.double(), 1e-6)
    with pytest.raises(ShapeError, match=r"weight must have shape \[8\], got \[2, 4\]"):
        decoder.prepare_norm(x, None, weight.reshape(2, 4), x, 1e-6)
    with pytest.raises(ShapeError, match="contiguous"):
        decoder.prepare_norm(torch.zeros(8, 2).T, None, weight, x, 1e-6)
    with pytest.raises(ShapeError, match="even head_dim"):
        decoder.KeyValueCache.make(positions=4, kv_heads=1, head_dim=7, dtype=torch.float32)
    with pytest.raises(DtypeError, match="float32 or bfloat16"):
        decoder.KeyValueCache.make(positions=4, kv_heads=1, head_dim=8, dtype=torch.float16)
    cache = decoder.KeyValueCache.make(positions=4, kv_heads=2, head_dim=8, dtype=torch.float32)
    first, turn = torch.tensor([0]), rotation(64, 8, norms=False)
    with pytest.raises(ShapeError, match="cannot share"):
        decoder.prepare_heads(torch.zeros(1, 7 * 8), first, cache, turn)
    with pytest.raises(DtypeError, match="first"):
        decoder.prepare_heads(torch.zeros(1, 8 * 8), first.int(), cache, turn)
    with pytest.raises(ShapeError, match="window"):
        decoder.prepare_attention(
            torch.zeros(1, 64), first, cache, torch.zeros(1, 32), decoder.attention_scratch(4, cache), scale=1, window=0
        )
    with pytest.raises(ShapeError, match="empty"):
        decoder.largest_index(torch.zeros(0))


def test_without_the_extension_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "NATIVE", None)
    monkeypatch.setattr(native, "UNAVAILABLE", "install a C++20 compiler")
    with pytest.raises(KernelError, match="install a C"):
        decoder.prepare_gate(torch.zeros(1, 4), torch.zeros(1, 2), decoder.Gate.SILU)
