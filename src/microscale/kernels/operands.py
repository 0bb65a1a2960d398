"""What the operations of a decoder take beside tensors: the key/value cache, rotations, gates, joined outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from microscale.formats import Format


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
