"""Look-up tables that are narrower in memory than in use: QuantizedEmbedding (packed rows) and NarrowEmbedding."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from microscale.kernels import dequantize
from microscale.layer_spec import LayerSpec
from microscale.layouts.row_major import NAME as ROW_MAJOR
from microscale.nn.modules import KeptDtypes
from microscale.nn.packed import PackedModule
from microscale.tensor import QuantizedTensor

PIECE_ROWS = 1024
"""Rows that are looked up at a time: a layout that stores rows in groups gives whole groups."""


class QuantizedEmbedding(PackedModule):
    """Rows of a packed table [num_embeddings, embedding_dim]; only the rows asked for are dequantized.

    ``scaling`` is the model's own embedding without its table, where that does more than look rows up (Gemma multiplies
    them by a constant): its forward runs on the rows that were found.
    """

    scaling: nn.Embedding | None

    def __init__(
        self, spec: LayerSpec, *, original: nn.Module | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__(spec, device=device)
        self.num_embeddings, self.embedding_dim = spec.shape
        self.output_dtype = spec.dtype
        self.scaling = _without_table(original) if isinstance(original, nn.Embedding) else None

    @classmethod
    def from_tensor(
        cls, tensor: QuantizedTensor, *, method: str = "rtn", original: nn.Module | None = None
    ) -> QuantizedEmbedding:
        """Build the table around a quantized weight [num_embeddings, embedding_dim], for what stood in its place."""
        spec = LayerSpec(
            name="", format=tensor.format, shape=tensor.shape, dtype=tensor.dtype, method=method, kind="embedding"
        )
        layer = cls(spec, original=original, device="meta")
        layer.set_tensor(tensor)
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        super()._apply(fn, recurse)
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype)).dtype
        return self

    def forward(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... embedding_dim"]:
        """Look rows up; the result has the float dtype of the model (:attr:`output_dtype`)."""
        rows = self.rows(indices.reshape(-1), self.output_dtype)
        if self.scaling is not None:
            rows = _with_table(self.scaling, rows)(torch.arange(rows.shape[0], device=rows.device))
        return rows.reshape(*indices.shape, self.embedding_dim)

    def rows(self, indices: Int[Tensor, " count"], dtype: torch.dtype) -> Float[Tensor, "count embedding_dim"]:
        """Return rows of the table as floats, not scaled."""
        cached = self.float_weight(dtype)
        if cached is None:
            step = PIECE_ROWS if self.layout != ROW_MAJOR else max(1, indices.numel())
            pieces = [self.tensor.select_rows(piece) for piece in indices.split(step)]
            chosen = [dequantize(piece, dtype) for piece in pieces if piece is not None]
            if len(chosen) == len(pieces):
                return chosen[0] if len(chosen) == 1 else torch.cat(chosen)
            cached = dequantize(self.tensor, dtype)
        return functional.embedding(indices, cached)


def _without_table(original: nn.Embedding) -> nn.Embedding | None:
    """Return a copy of an embedding that has no rows, or None for one that does nothing but look them up."""
    if type(original).forward is nn.Embedding.forward:
        return None
    found = copy.copy(original)
    buffers, kept = dict(original.named_buffers(recurse=False)), set(vars(original)["_non_persistent_buffers_set"])
    vars(found).update(_parameters={}, _buffers=buffers, _non_persistent_buffers_set=kept)
    found.padding_idx = None  # the rows that are put in are others than those it counts
    empty = torch.empty(0, original.embedding_dim, dtype=original.weight.dtype, device=original.weight.device)
    found.register_buffer("weight", empty, persistent=False)
    return found


def _with_table(scaling: nn.Embedding, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the forward of an embedding whose table are these rows; the module itself stays as it is."""
    found = copy.copy(scaling)
    vars(found).update(_buffers={**dict(scaling.named_buffers(recurse=False)), "weight": rows})
    return lambda indices: type(found).forward(found, indices)


def float_embedding(module: QuantizedEmbedding, dtype: torch.dtype) -> nn.Embedding:
    """Return the embedding that a packed one stands for, with its table as floats."""
    weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
    if module.scaling is None:
        return nn.Embedding.from_pretrained(weight)
    found = copy.copy(module.scaling)
    buffers = {name: buffer for name, buffer in module.scaling.named_buffers(recurse=False) if name != "weight"}
    vars(found).update(_buffers=buffers, _parameters={"weight": weight})
    return found


class NarrowEmbedding(KeptDtypes):
    """A float table that stays in the dtype of its file, beside a model that computes in a wider one.

    Rows are cast when they are looked up, which is exact, so the results are those of a table cast as a whole. The
    table is a buffer, and casting the module (``to(dtype)``, ``half()``) changes :attr:`output_dtype` alone.
    """

    weight: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype,
        output_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.output_dtype = output_dtype
        self.register_buffer("weight", torch.empty(num_embeddings, embedding_dim, dtype=dtype, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NarrowEmbedding:
        super()._apply(fn, recurse)
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype)).dtype
        return self

    def forward(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... embedding_dim"]:
        """Look rows up; the result has the float dtype of the model (:attr:`output_dtype`)."""
        return functional.embedding(indices, self.weight).to(self.output_dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}x{self.embedding_dim}, {self.weight.dtype}"
