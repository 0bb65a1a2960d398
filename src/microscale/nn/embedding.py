"""Look-up tables that are narrower in memory than in use: QuantizedEmbedding (packed rows) and NarrowEmbedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from microscale.kernels import dequantize
from microscale.layer_spec import LayerSpec
from microscale.nn.modules import KeptDtypes
from microscale.nn.packed import PackedModule
from microscale.tensor import QuantizedTensor


class QuantizedEmbedding(PackedModule):
    """Rows of a packed table [num_embeddings, embedding_dim]; only the rows asked for are dequantized."""

    def __init__(self, spec: LayerSpec, *, device: torch.device | str | None = None) -> None:
        super().__init__(spec, device=device)
        self.num_embeddings, self.embedding_dim = spec.shape
        self.output_dtype = spec.dtype

    @classmethod
    def from_tensor(cls, tensor: QuantizedTensor, *, method: str = "rtn") -> QuantizedEmbedding:
        """Build the table around a quantized weight [num_embeddings, embedding_dim]."""
        spec = LayerSpec(
            name="", format=tensor.format, shape=tensor.shape, dtype=tensor.dtype, method=method, kind="embedding"
        )
        layer = cls(spec, device="meta")
        layer.set_tensor(tensor)
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        super()._apply(fn, recurse)
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype)).dtype
        return self

    def forward(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... embedding_dim"]:
        """Look rows up; the result has the float dtype of the model (:attr:`output_dtype`)."""
        cached = self.float_weight(self.output_dtype)
        if cached is None:
            chosen = self.tensor.select_rows(indices.reshape(-1))
            if chosen is not None:
                return dequantize(chosen, self.output_dtype).reshape(*indices.shape, self.embedding_dim)
            cached = dequantize(self.tensor, self.output_dtype)
        return functional.embedding(indices, cached)


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
