"""What the operations of a decoder take beside tensors: the key/value cache, rotations, gates, joined outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from microscale.errors import ShapeError, check_kind
from microscale.formats import Format
from microscale.tensor import QuantizedTensor


class Gate(Enum):
    """The activation function of a gated layer; the value is the name in a transformers config."""

    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"


class Combine(Enum):
    """What becomes of the outputs of several weights that share their input."""

    CONCATENATE = "concatenate"
    """They stand side by side."""
    SILU_MUL = "silu_mul"
    """Of two weights: silu(first) * second."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightGroup:
    """Packed weights [rows_i, cols] that share their input, with a bias or None each.

    ``activations`` is the format that the input is rounded to on the fly, exactly; None keeps it as it is. Under
    ``prepared`` a backend keeps what it made of the weights, by its name: they must not change any more.

    Raises:
        ShapeError: weights of different widths, a bias of another length, or SILU_MUL of other than two equal weights.
        ArgumentError: weights that are none.
    """

    weights: tuple[QuantizedTensor, ...]
    biases: tuple[Tensor | None, ...]
    activations: Format | None = None
    combine: Combine = Combine.CONCATENATE
    prepared: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)

    def __post_init__(self) -> None:
        for weight in self.weights:
            check_kind(weight, QuantizedTensor, "a weight of a group", "a QuantizedTensor (quantize makes one)")
        shapes = [tuple(weight.shape) for weight in self.weights]
        if not shapes or len(self.biases) != len(shapes) or any(shape[1:] != (self.cols,) for shape in shapes):
            raise ShapeError(f"weights that share their input need one width and a bias (or None) each, got {shapes}")
        if self.combine is Combine.SILU_MUL and (len(shapes) != 2 or shapes[0] != shapes[1]):
            raise ShapeError(f"silu_mul takes two weights of equal shape, got {shapes}")
        for bias, shape in zip(self.biases, shapes, strict=True):
            if bias is not None and tuple(bias.shape) != shape[:1]:
                raise ShapeError(f"the bias of a weight with {shape[0]} rows is [{shape[0]}], got {list(bias.shape)}")

    @property
    def cols(self) -> int:
        """Columns of every weight."""
        return self.weights[0].cols

    @property
    def rows_out(self) -> int:
        """Columns of the result."""
        rows = [weight.rows for weight in self.weights]
        return rows[0] if self.combine is Combine.SILU_MUL else sum(rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights together."""
        return sum(weight.num_bytes for weight in self.weights)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rotation:
    """Cosines and sines [positions, head_dim] of the rotary embedding, and the norms of query and key heads."""

    cosines: Tensor
    sines: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyValueCache:
    """Keys and values of one layer for ``capacity`` positions, allocated once (:func:`~.decoder_ops.make_cache`).

    ``stored`` is what keys and values are rounded to as they come in, along the head: a float dtype, or a format.
    ``layout`` names how ``keys`` and ``values`` lie; it belongs to a backend. ``length`` (int64 [1]) says how many
    positions were filled before the rows of the present call; whoever appends moves it on. Layers may share it.
    """

    stored: Format | torch.dtype
    layout: str
    kv_heads: int
    head_dim: int
    capacity: int
    length: Tensor
    keys: Tensor
    values: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values together."""
        return self.keys.numel() * self.keys.element_size() + self.values.numel() * self.values.element_size()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """A memory layout of keys and values.

    Capacities are multiples of ``span``. ``allocate(capacity, kv_heads, head_dim, dtype, device)`` returns empty keys
    and values; ``read(cache)`` gives both as [kv_heads, capacity, head_dim].
    """

    name: str
    span: int
    allocate: Callable[[int, int, int, torch.dtype, torch.device], tuple[Tensor, Tensor]]
    read: Callable[[KeyValueCache], tuple[Tensor, Tensor]]
