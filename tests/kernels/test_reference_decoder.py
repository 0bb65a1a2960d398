"""The decoder's operations in plain torch, against torch's own functions and the rotation of transformers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from microscale.formats import Format, parse_format
from microscale.kernels import Combine, Gate, KeyValueCache, Rotation, fake_quantize, linear, quantize
from microscale.kernels.operands import WeightGroup
from microscale.kernels.reference import decoder

HEAD_DIM, KV_HEADS, HEADS = 8, 2, 4


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cache_of(length: int, stored: torch.dtype | Format = torch.float32, capacity: int = 12) -> KeyValueCache:
    dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    keys, values = decoder.CACHE.allocate(capacity, KV_HEADS, HEAD_DIM, dtype, torch.device("cpu"))
    keys[:, :length], values[:, :length] = (randn(KV_HEADS, length, HEAD_DIM, seed=seed).to(dtype) for seed in (1, 2))
    return KeyValueCache(
        stored=stored,
        layout=decoder.CACHE.name,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        capacity=capacity,
        length=torch.tensor([length]),
        keys=keys,
        values=values,
    )


def rotation(capacity: int = 12) -> Rotation:
    angles = torch.arange(capacity)[:, None] * 100.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    both = torch.cat([angles, angles], -1)
    return Rotation(cosines=both.cos(), sines=both.sin())


@pytest.mark.parametrize("with_added", [True, False])
def test_the_residual_takes_what_is_added_and_the_norm_is_that_of_torch(with_added: bool) -> None:
    residual, added, weight = randn(3, 40), randn(3, 40, seed=1), randn(40, seed=2)
    expected = residual + added if with_added else residual.clone()
    out = torch.empty(3, 40)
    decoder.add_rms_norm(residual, added if with_added else None, weight, 1e-5, out)
    assert torch.equal(residual, expected)
    torch.testing.assert_close(out, functional.rms_norm(expected, (40,), weight, 1e-5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", [0, 5])
def test_heads_are_rotated_as_in_transformers_and_stored_behind_the_length(first: int) -> None:
    cache, turn = cache_of(first), rotation()
    kept = cache.keys[:, :first].clone()
    heads = randn(3, (HEADS + 2 * KV_HEADS) * HEAD_DIM, seed=4)
    queries, keys, values = (
        heads.clone().unflatten(1, (-1, HEAD_DIM)).transpose(0, 1).split([HEADS, KV_HEADS, KV_HEADS])
    )
    cosines, sines = turn.cosines[None, first : first + 3], turn.sines[None, first : first + 3]
    wanted_queries, wanted_keys = apply_rotary_pos_emb(queries[None], keys[None], cosines, sines)
    decoder.store_heads(heads, cache, turn)
    got = heads.unflatten(1, (-1, HEAD_DIM)).transpose(0, 1)
    torch.testing.assert_close(got[:HEADS], wanted_queries[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cache.keys[:, first : first + 3], wanted_keys[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(cache.values[:, first : first + 3], values)
    assert torch.equal(cache.keys[:, :first], kept) and not cache.keys[:, first + 3 :].any()
    assert int(cache.length) == first, "who appends moves the length on"


@pytest.mark.parametrize("word", ["mxfp4", "int8/8:fp32"])
def test_a_cache_of_a_format_holds_numbers_of_the_format(word: str) -> None:
    cache, turn = cache_of(0, parse_format(word)), rotation()
    heads = randn(2, (HEADS + 2 * KV_HEADS) * HEAD_DIM, seed=4)
    values = heads.unflatten(1, (-1, HEAD_DIM))[:, -KV_HEADS:].transpose(0, 1).clone()
    decoder.store_heads(heads, cache, turn)
    assert torch.equal(cache.values[:, :2], fake_quantize(values, word))
    assert torch.equal(cache.keys[:, :2], fake_quantize(cache.keys[:, :2].contiguous(), word)), "rounding twice is once"


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("rows", "first"), [(1, 0), (1, 6), (4, 0), (3, 5)])
def test_attention_is_that_of_torch(rows: int, first: int, window: int | None) -> None:
    cache = cache_of(first + rows)
    cache.length.fill_(first)
    heads, out = randn(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM, seed=4), torch.empty(rows, HEADS * HEAD_DIM)
    decoder.attend(heads, cache, out, 0.3, window)
    own, places = torch.arange(first, first + rows)[:, None], torch.arange(first + rows)
    mask = places <= own if window is None else (places <= own) & (own - places < window)
    queries = heads[:, : HEADS * HEAD_DIM].unflatten(1, (HEADS, HEAD_DIM)).transpose(0, 1)
    keys, values = (table[:, : first + rows] for table in (cache.keys, cache.values))
    expected = functional.scaled_dot_product_attention(
        queries[None], keys[None], values[None], attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, expected[0].transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-6)


def test_one_token_sees_itself_alone() -> None:
    cache, out = cache_of(1), torch.empty(1, HEADS * HEAD_DIM)
    cache.length.fill_(0)
    decoder.attend(randn(1, (HEADS + 2 * KV_HEADS) * HEAD_DIM), cache, out, 1.0, None)
    assert torch.equal(
        out.unflatten(1, (HEADS, HEAD_DIM))[0], cache.values[:, 0].repeat_interleave(HEADS // KV_HEADS, 0)
    )


@pytest.mark.parametrize(("kind", "function"), [(Gate.SILU, functional.silu), (Gate.GELU_TANH, "tanh")])
def test_gates_are_those_of_torch(kind: Gate, function: object) -> None:
    pairs = randn(3, 20) * 4
    pairs[0, 0], pairs[0, 1], pairs[0, 2] = -math.inf, 0.0, math.nan
    out = torch.empty(3, 10)
    decoder.gate(pairs, out, kind)
    first, second = pairs.chunk(2, 1)
    gated = functional.silu(first) if callable(function) else functional.gelu(first, approximate="tanh")
    torch.testing.assert_close(out[:, 1:], (gated * second)[:, 1:], rtol=2e-6, atol=1e-6, equal_nan=True)
    assert out[0, 0].isnan() and out[0, 1] == 0 and out[0, 2].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_weights_are_used_as_the_numbers_that_they_are(dtype: torch.dtype) -> None:
    inputs, weight, bias = randn(2, 24).round(), (randn(5, 24, seed=1) * 4).round().to(dtype), randn(5, seed=2).round()
    out = torch.empty(2, 5)
    decoder.linear_dense(inputs, weight, bias, out)
    assert torch.equal(out.double(), inputs.double() @ weight.double().T + bias.double()), "whole numbers sum exactly"


def test_weights_side_by_side_and_gated() -> None:
    inputs, bias = randn(3, 64), randn(5, seed=7)
    first, second = (quantize(randn(5, 64, seed=seed), "mxfp4") for seed in (1, 2))
    out = torch.empty(3, 10)
    group = WeightGroup(weights=(first, second), biases=(bias, None), activations=parse_format("mxfp8"))
    decoder.linear_group(inputs, group, out)
    rounded = fake_quantize(inputs, "mxfp8")
    sides = linear(rounded, first, bias), linear(rounded, second)
    torch.testing.assert_close(out, torch.cat(sides, 1), rtol=1e-5, atol=1e-5)
    gated = torch.empty(3, 5)
    decoder.linear_group(inputs, dataclasses.replace(group, combine=Combine.SILU_MUL), gated)
    torch.testing.assert_close(gated, functional.silu(sides[0]) * sides[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("numbers", "place"),
    [
        ([3.0], 0),
        ([1.0, 5.0, 5.0], 1),
        ([-math.inf, -math.inf], 0),
        ([1.0, math.inf, math.nan, math.nan], 2),
        ([-0.0, 0.0], 0),
    ],
)
def test_the_first_of_the_largest(numbers: list[float], place: int) -> None:
    assert decoder.largest_index(torch.tensor(numbers)) == place


def test_a_cache_reads_as_it_lies() -> None:
    cache = cache_of(3)
    keys, values = decoder.CACHE.read(cache)
    assert keys is cache.keys and values is cache.values and tuple(keys.shape) == (KV_HEADS, 12, HEAD_DIM)
