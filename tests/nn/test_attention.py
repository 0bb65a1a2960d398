"""Rounded attention against a few loops that take the definition word by word, one query at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microscale
from microscale.errors import ModelError
from microscale.nn.attention import rounded_attention
from microscale.nn.attention_setting import AttentionFormats, parse_attention

HEADS, KV_HEADS = 4, 2
FORMATS = [
    "mxfp4",
    "mxfp4_plus",
    "mxfp4_plusplus",
    "mxfp6_e2m3",
    "mxfp8",
    "mxint8",
    "nvfp4",
    "nvfp4_plus",
    "e2m1/8:e4m3",
]


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float = 0.2,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What families of grouped heads compute."""
    group = query.shape[1] // key.shape[1]
    scores = torch.matmul(query, key.repeat_interleave(group, 1).transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    weights = functional.softmax(scores, dim=-1)
    return torch.matmul(weights, value.repeat_interleave(group, 1)).transpose(1, 2), weights


def rounded(values: Tensor, word: str, whole: Tensor | None = None) -> Tensor:
    """Round along the last axis; ``whole`` gives the maximum of a scale per tensor."""
    has_tensor_scale = whole is not None and "nvfp4" in word
    amax = whole.abs().amax().reshape(1) if whole is not None and has_tensor_scale else None
    return microscale.dequantize_tensor(microscale.kernels.quantize(values.contiguous(), word, amax=amax))


def looped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_seen: Tensor,
    *,
    products: str | None = None,
    kv_cache: str | None = None,
    scaling: float = 0.2,
    softcap: float | None = None,
) -> Tensor:
    """The oracle: each query with the tokens it sees, everything behind the last of them zero."""
    batch, heads, num_queries, _ = query.shape
    if kv_cache is not None:
        key, value = rounded(key, kv_cache), rounded(value, kv_cache)
    value = value * is_seen.any(1)[:, None, :, None]
    if products is not None:
        query, key = rounded(query, products), rounded(key, products)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(heads // key.shape[1], 1)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~is_seen[:, None], -math.inf)
    weights = scores.softmax(-1)
    if products is not None:
        weights = rounded(weights, products)
    output = torch.zeros(batch, num_queries, heads, value.shape[-1])
    for b in range(batch):
        for q in range(num_queries):
            last = int(is_seen[b, q].nonzero().max())
            known = value.clone()
            known[b, :, last + 1 :] = 0
            if products is not None:  # [batch, kv_heads, value_dim, keys]: blocks run along the keys
                known = rounded(known.transpose(2, 3), products, whole=value).transpose(2, 3)
            for h in range(heads):
                output[b, q, h] = weights[b, h, q] @ known[b, h * value.shape[1] // heads]
    return output


def operands(
    num_queries: int, num_keys: int, head_dim: int = 40, value_dim: int = 40, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, tokens: int, width: int) -> Tensor:
        values = torch.randn(2, heads, tokens, width, generator=generator)
        return values * torch.exp(torch.randn(2, heads, tokens, 1, generator=generator))

    return (
        draw(HEADS, num_queries, head_dim),
        draw(KV_HEADS, num_keys, head_dim),
        draw(KV_HEADS, num_keys, value_dim),
    )


def causal(num_queries: int, num_keys: int, window: int | None = None) -> Tensor:
    """Return which keys are seen [2, queries, keys]; the last query stands at the last key."""
    places = torch.arange(num_keys - num_queries, num_keys)[:, None]
    seen = torch.arange(num_keys) <= places
    if window is not None:
        seen &= torch.arange(num_keys) > places - window
    return seen.expand(2, -1, -1)


def additive(is_seen: Tensor) -> Tensor:
    return torch.where(is_seen, 0.0, torch.finfo(torch.float32).min)[:, None]


def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, formats: AttentionFormats, **options: Any):
    return rounded_attention(plain_attention, nn.Identity(), query, key, value, mask, formats, **options)[0]


def given(products: str | None = None, kv_cache: str | None = None) -> AttentionFormats:
    return AttentionFormats(products=parse_attention(products), kv_cache=parse_attention(kv_cache))


@pytest.mark.parametrize("word", FORMATS)
def test_products_against_the_definition(word: str) -> None:
    query, key, value = operands(37, 37)
    seen = causal(37, 37)
    expected = looped_attention(query, key, value, seen, products=word)
    found = run(query, key, value, additive(seen), given(word))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (found - run(query, key, value, additive(seen), given())).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "window"), [(1, 33, None), (5, 40, None), (40, 40, 9), (70, 70, 33), (3, 64, None)]
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_masks_of_all_kinds(num_queries: int, num_keys: int, window: int | None, softcap: float | None) -> None:
    query, key, value = operands(num_queries, num_keys, head_dim=8, value_dim=5)
    seen = causal(num_queries, num_keys, window)
    expected = looped_attention(query, key, value, seen, products="mxfp4", softcap=softcap)
    found = run(query, key, value, additive(seen), given("mxfp4"), softcap=softcap)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_masks_that_differ_in_the_batch() -> None:
    query, key, value = operands(40, 40, head_dim=8, value_dim=5)
    seen = causal(40, 40).clone()
    seen[0, :, :7] = False  # padding on the left of one text
    seen[0, :7] = torch.eye(40, dtype=torch.bool)[:7]
    seen[1, :, 35:] = False  # and on the right of the other
    expected = looped_attention(query, key, value, seen, products="mxfp4_plus")
    found = run(query, key, value, additive(seen), given("mxfp4_plus"))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("word", ["mxfp4", "mxfp8", "nvfp4", "int8/channel:fp32"])
def test_the_cache_is_rounded_token_by_token_along_the_head(word: str) -> None:
    query, key, value = operands(12, 12)
    seen = causal(12, 12)
    expected = looped_attention(query, key, value, seen, kv_cache=word)
    torch.testing.assert_close(
        run(query, key, value, additive(seen), given(kv_cache=word)), expected, atol=2e-5, rtol=1e-4
    )


def test_cache_and_products_together() -> None:
    query, key, value = operands(34, 34)
    seen = causal(34, 34)
    expected = looped_attention(query, key, value, seen, products="mxfp6_e2m3", kv_cache="mxfp4")
    found = run(query, key, value, additive(seen), given("mxfp6_e2m3", "mxfp4"))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "word",
    [
        "int8/channel:fp32",
        "e4m3/tensor:fp32",
        "e2m1/8x8:e8m0",
        "mxfp4+sparse5%:fp16",
        "pair(int2/32:fp16:asym,mxfp4,50%)",
    ],
)
def test_formats_of_whole_tensors_take_the_operand_at_hand(word: str) -> None:
    query, key, value = operands(40, 40)
    mask = additive(causal(40, 40))
    scores = torch.matmul(rounded(query, word), rounded(key, word).repeat_interleave(2, 1).transpose(2, 3)) * 0.2 + mask
    known = rounded(value.transpose(2, 3), word).transpose(2, 3).repeat_interleave(2, 1)
    expected = torch.matmul(rounded(scores.softmax(-1), word), known).transpose(1, 2)
    torch.testing.assert_close(run(query, key, value, mask, given(word)), expected, atol=2e-5, rtol=1e-4)


def test_without_a_mask_every_query_sees_all() -> None:
    query, key, value = operands(5, 37)
    expected = looped_attention(query, key, value, torch.ones(2, 5, 37, dtype=torch.bool), products="mxfp4")
    torch.testing.assert_close(run(query, key, value, None, given("mxfp4")), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("word", ["mxfp4", "mxfp4_plusplus", "e2m1/16:e4m3", "int4/32:fp16:asym"])
def test_a_token_does_not_hang_on_later_ones(word: str) -> None:
    query, key, value = operands(50, 50)
    found = run(query, key, value, additive(causal(50, 50)), given(word, word))
    key[:, :, 33:], value[:, :, 33:], query[:, :, 33:] = 1e4, -1e4, 3.0
    changed = run(query, key, value, additive(causal(50, 50)), given(word, word))
    torch.testing.assert_close(changed[:, :33], found[:, :33], atol=1e-6, rtol=1e-5)
    assert (changed[:, 33:] - found[:, 33:]).abs().max() > 1


@pytest.mark.parametrize("word", ["mxfp4", "mxfp8"])
def test_step_by_step_is_as_all_at_once(word: str) -> None:
    query, key, value = operands(45, 45)
    whole = run(query, key, value, additive(causal(45, 45)), given(word, "mxfp8"))
    for token in range(45):
        own = (query[:, :, token : token + 1], key[:, :, : token + 1], value[:, :, : token + 1])
        found = run(*own, None, given(word, "mxfp8"))
        torch.testing.assert_close(found[:, 0], whole[:, token], atol=2e-5, rtol=1e-4)


def test_padding_does_not_count() -> None:
    query, key, value = operands(40, 40)
    seen = causal(40, 40).clone()
    seen[:, :, :8] = False
    found = run(query, key, value, additive(seen), given("mxfp4"))
    key[:, :, :8], value[:, :, :8] = 1e5, 1e5
    torch.testing.assert_close(run(query, key, value, additive(seen), given("mxfp4"))[:, 8:], found[:, 8:])


def test_padding_of_whole_blocks_changes_nothing() -> None:
    query, key, value = operands(40, 40)
    found = run(query, key, value, additive(causal(40, 40)), given("mxfp4"))
    query, key, value = (functional.pad(part, (0, 0, 32, 0), value=7.0) for part in (query, key, value))
    seen = causal(72, 72).clone()
    seen[:, :, :32] = False
    padded = run(query, key, value, additive(seen), given("mxfp4"))
    torch.testing.assert_close(padded[:, 32:], found, atol=1e-6, rtol=1e-5)


def test_operands_are_not_changed() -> None:
    before = operands(20, 20)
    query, key, value = (part.clone() for part in before)
    run(query, key, value, additive(causal(20, 20)), given("mxfp4", "mxfp4"))
    assert all(torch.equal(one, other) for one, other in zip(before, (query, key, value), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats_stay_what_they_are(dtype: torch.dtype) -> None:
    query, key, value = (part.to(dtype) for part in operands(40, 40))
    mask = torch.where(causal(40, 40), 0.0, torch.finfo(dtype).min).to(dtype)[:, None]
    found = run(query, key, value, mask, given("mxint8"))
    assert found.dtype == dtype
    expected = looped_attention(query.float(), key.float(), value.float(), causal(40, 40), products="mxint8")
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


def one_product(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return torch.matmul(query, key.repeat_interleave(2, 1).transpose(2, 3))


def fused(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return functional.scaled_dot_product_attention(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))


@pytest.mark.parametrize("attention", [one_product, fused])
def test_what_is_not_two_products_is_refused(attention: Any) -> None:
    query, key, value = operands(5, 5)
    with pytest.raises(ModelError, match="not two matrix products"):
        rounded_attention(attention, nn.Identity(), query, key, value, None, given("mxfp4"))
    rounded_attention(attention, nn.Identity(), query, key, value, None, given(kv_cache="mxfp4"))


@pytest.mark.parametrize("formats", [given("mxfp8"), given(None, "mxfp8"), given("mxfp4", "mxfp8")])
def test_a_gradient_passes_as_if_nothing_was_rounded(formats: AttentionFormats) -> None:
    """Against the gradient of the same attention in floats: near it, for MXFP8 and MXFP4 change the numbers little."""

    def gradients(chosen: AttentionFormats) -> list[Tensor]:
        query, key, value = (each.clone().requires_grad_() for each in operands(5, 7))
        run(query, key, value, additive(causal(5, 7)), chosen).square().sum().backward()
        return [each.grad for each in (query, key, value) if each.grad is not None]

    found, exact = gradients(formats), gradients(given())
    assert len(found) == len(exact) == 3
    for one, other in zip(found, exact, strict=True):
        assert float(functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)) > 0.8
