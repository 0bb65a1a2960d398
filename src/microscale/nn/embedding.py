"""QuantizedEmbedding: a look-up table with packed rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from microscale.formats import Format
from microscale.kernels import dequantize
from microscale.nn.packed import PackedModule
from microscale.tensor import QuantizedTensor


class QuantizedEmbedding(PackedModule):
    """Rows of a packed table [num_embeddings, embedding_dim]; only the rows asked for are dequantized."""

    def __init__(
        self,
        fmt: Format,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        method: str = "rtn",
    ) -> None:
        super().__init__(fmt, shape, dtype=dtype, device=device, method=method, kind="embedding")
        self.num_embeddings, self.embedding_dim = shape
        self.output_dtype = dtype

    @classmethod
    def from_tensor(cls, tensor: QuantizedTensor, *, method: str = "rtn") -> QuantizedEmbedding:
        """Build the table around a quantized weight [num_embeddings, embedding_dim]."""
        layer = cls(tensor.format, tensor.shape, dtype=tensor.dtype, device="meta", method=method)
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
