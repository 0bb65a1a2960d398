"""Attention whose operands are rounded: the KV cache, and what enters the products Q·Kᵀ and P·V.

Every family has its own attention (grouped heads, soft caps, sinks, masks). Nothing of that is computed here: the
function of the family runs, on rounded queries, keys and values, and its second product gets rounded probabilities.

Blocks run along the dimension that a product sums over: Q and K along the head, P and V along the keys. A block of V
thus holds several tokens. A query never sees the tokens behind it, so for every query the block that reaches behind the
last key it sees is rounded as if those tokens were zeros, which is what a cache holds when that query is computed: the
result of a token does not depend on later ones. Keys that no query of a call sees (padding) count as zeros too. The KV
cache is rounded as tokens arrive, each alone, along the head.

Left out: speed. Numbers are rounded and computed with as floats; nothing is stored packed.

Source: the setting of table 2 in arXiv 2510.14557, where the operands of all products are quantized along the dimension
that is summed over. What a block of V holds for a query is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from microscale.errors import ModelError
from microscale.formats import BlockFormat, Format, VectorBlock
from microscale.kernels import fake_quantize
from microscale.kernels.decoder_ops import as_cached
from microscale.kernels.straight_through import straight_through
from microscale.nn.attention_setting import AttentionFormats, FileScales

QUERIES_AT_ONCE = 128
"""How many queries get their own rounding of a block of V in one step, which bounds the memory."""

_MATMULS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm})
_OTHER_PRODUCTS = frozenset({torch.einsum, torch.baddbmm, functional.scaled_dot_product_attention})


def rounded_attention(
    attention: Callable[..., Any],
    module: nn.Module,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    mask: Tensor | None,
    formats: AttentionFormats,
    **options: Any,
) -> Any:
    """Run a family's ``attention`` with rounded operands; returns what it returns.

    ``mask`` is added to the scores (or boolean, True where a key is seen); it says which keys a query sees.

    Special values: those of the formats. A query that sees no key takes the rounding of whole blocks.

    Raises:
        ModelError: the function does not compute attention by two matrix products.
    """
    if isinstance(formats.kv_cache, FileScales):
        key = by_scale(key, module.get_buffer("k_scale"), formats.kv_cache)
        value = by_scale(value, module.get_buffer("v_scale"), formats.kv_cache)
    elif formats.kv_cache is not None:
        key = as_cached(key, formats.kv_cache, "the keys of the cache")
        value = as_cached(value, formats.kv_cache, "the values of the cache")
    if formats.products is None:
        return attention(module, query, key, value, mask, **options)
    query = _rounded(query, formats.products, "the queries of attention")
    key = _rounded(key, formats.products, "the keys of attention")
    values = _RoundedValues(value, formats.products, _seen_keys(mask, query.shape[-2], value.shape[-2]))
    with _RoundedProducts(values, type(module).__name__) as products:
        result = attention(module, query, key, values.whole, mask, **options)
    products.check()
    return result


def by_scale(
    values: Float[Tensor, "batch heads keys dim"], scale: Float[Tensor, "..."], codes: FileScales
) -> Float[Tensor, "batch heads keys dim"]:
    """Return values / scale, rounded to nearest even and held to the range of the codes, times the scale.

    ``scale`` has one number, or one for each head ([heads, 1, 1]). It is computed in float32. NaN stays NaN in E4M3;
    infinite values become the largest number. A gradient passes as if nothing were rounded.
    """

    def rounded(kept: Tensor) -> Tensor:
        scaled = kept.to(torch.float32) / scale.to(torch.float32)
        if codes is FileScales.E4M3:
            whole = scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(torch.float32)
        else:
            whole = scaled.clamp(-128.0, 127.0).round()
        return (whole * scale.to(torch.float32)).to(kept.dtype)

    return straight_through(values, rounded)


def _rounded(values: Tensor, fmt: Format, name: str, amax: Tensor | None = None) -> Tensor:
    """Return the numbers rounded; a gradient passes as if they were not."""
    return straight_through(values, lambda kept: fake_quantize(kept, fmt, amax=amax, name=name))


def _seen_keys(mask: Tensor | None, num_queries: int, num_keys: int) -> Bool[Tensor, "batch queries keys"] | None:
    """Return which keys each query sees (with any head); None: all of them. The batch may be 1 for all."""
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen[..., :num_keys].any(dim=1).expand(-1, num_queries, num_keys)


class _RoundedValues:
    """Values rounded along the keys: ``whole`` by whole blocks, and for single queries by what those see."""

    def __init__(self, value: Tensor, fmt: Format, seen: Tensor | None) -> None:
        self.format = fmt
        self.size = _block_size(fmt)
        self.num_keys = value.shape[-2]
        if seen is not None:
            value = torch.where(seen.any(dim=1)[:, None, :, None], value, torch.zeros_like(value))
        self.exact = value
        self.whole = self._rounded(value.transpose(-1, -2), None).transpose(-1, -2)
        self.last: Int[Tensor, "batch queries"] | None = None
        if seen is not None and self.size is not None:
            places = torch.arange(self.num_keys, device=seen.device)
            last = torch.where(seen, places, -1).amax(dim=-1)
            self.last = torch.where(last < 0, self.num_keys - 1, last)

    def _rounded(self, values: Tensor, amax: Tensor | None) -> Tensor:
        return _rounded(values.contiguous(), self.format, "the values of attention", amax)

    def product(
        self, multiply: Callable[..., Tensor], probabilities: Float[Tensor, "batch heads queries keys"], values: Tensor
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        """Return the product of rounded probabilities with ``values``, which are ``whole`` for every query head.

        Queries whose last block reaches behind what they see get their own rounding of it. Probabilities are zero
        behind the last key that a query sees.
        """
        queries = self._cut_queries()
        if self.last is None or self.size is None or not queries.numel():
            return multiply(probabilities, values)
        batch = probabilities.shape[0]
        last = self.last[:, queries].expand(batch, -1)
        rows = torch.arange(batch, device=last.device)[:, None]
        padded = functional.pad(probabilities, (0, -self.num_keys % self.size))
        rest = padded.clone().unflatten(-1, (-1, self.size))
        own = rest[rows, :, queries, last // self.size]  # a copy: batch, queries, heads, size
        rest[rows, :, queries, last // self.size] = 0
        output = multiply(rest.flatten(-2)[..., : self.num_keys], values)
        exact, amax = self._exact_blocks(), self._amax()
        for start in range(0, queries.numel(), QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            found = self._own_product(exact, own[:, part], last[:, part], amax)
            output[:, :, queries[part]] += found.transpose(1, 2)
        return output

    def _cut_queries(self) -> Int[Tensor, "queries"]:
        """Return the queries, of any text, that see a block of keys in part, with tokens behind."""
        if self.last is None or self.size is None:
            return torch.empty(0, dtype=torch.int64)
        is_cut = ((self.last + 1) % self.size != 0) & (self.last < self.num_keys - 1)
        return is_cut.any(dim=0).nonzero().flatten()

    def _exact_blocks(self) -> Float[Tensor, "batch blocks kv_heads value_dim size"]:
        assert self.size is not None
        padded = functional.pad(self.exact.transpose(-1, -2), (0, -self.num_keys % self.size))
        return padded.unflatten(-1, (-1, self.size)).permute(0, 3, 1, 2, 4).contiguous()

    def _amax(self) -> Float[Tensor, "1"] | None:
        """Return the maximum that the scale of the whole tensor follows, where the format has one."""
        if not isinstance(self.format, BlockFormat) or self.format.tensor_scale is None:
            return None
        finite = torch.where(torch.isfinite(self.exact), self.exact.abs(), torch.zeros_like(self.exact))
        return finite.amax().to(torch.float32).reshape(1)

    def _own_product(
        self,
        exact: Float[Tensor, "batch blocks kv_heads value_dim size"],
        own: Float[Tensor, "batch queries heads size"],
        last: Int[Tensor, "batch queries"],
        amax: Tensor | None,
    ) -> Float[Tensor, "batch queries heads value_dim"]:
        """Return what the last block of each query adds, rounded without the tokens behind the query."""
        assert self.size is not None
        rows = torch.arange(exact.shape[0], device=last.device)[:, None]
        is_behind = torch.arange(self.size, device=last.device) > (last % self.size)[..., None]
        cut = exact[rows, last // self.size].masked_fill_(is_behind[:, :, None, None, :], 0.0)
        rounded = self._rounded(cut, amax).to(own.dtype)
        found = torch.matmul(own.unflatten(2, (rounded.shape[2], -1)), rounded.transpose(-1, -2))
        return found.flatten(2, 3)


def _block_size(fmt: Format) -> int | None:
    """Return the length of a format's blocks, None where the rounding of one hangs on more than its own numbers."""
    if isinstance(fmt, BlockFormat) and isinstance(fmt.block, VectorBlock) and fmt.sparse is None:
        return fmt.block.size
    return None


class _RoundedProducts(TorchFunctionMode):
    """Watches the products of an attention function: the second one gets rounded probabilities."""

    def __init__(self, values: _RoundedValues, name: str) -> None:
        super().__init__()
        self.values = values
        self.name = name
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OTHER_PRODUCTS:
            self._refuse(f"it calls {getattr(func, '__name__', func)}")
        if func not in _MATMULS:
            return func(*args, **kwargs)
        self.count += 1
        if self.count != 2:
            return func(*args, **kwargs)
        probabilities, values = args
        if probabilities.ndim != 4 or probabilities.shape[-1] != self.values.num_keys:
            self._refuse(f"its second product takes {list(probabilities.shape)}, not probabilities of all keys")
        rounded = _rounded(probabilities, self.values.format, "the probabilities of attention")
        return self.values.product(func, rounded, values)

    def check(self) -> None:
        """Refuse a function that had another number of products.

        Raises:
            ModelError: it had.
        """
        if self.count != 2:
            self._refuse(f"it has {self.count} matrix products")

    def _refuse(self, reason: str) -> None:
        raise ModelError(
            f"the attention of {self.name} is not two matrix products that could be rounded: {reason};"
            " round the KV cache alone, or leave attention as it is"
        )
