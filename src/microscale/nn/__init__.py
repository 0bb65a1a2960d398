"""Modules that hold packed weights and call the kernels."""

from microscale.nn.activation import ActivationQuantizer, observe_activations
from microscale.nn.embedding import QuantizedEmbedding
from microscale.nn.linear import QuantizedLinear
from microscale.nn.packed import PackedModule, cached_weights

__all__ = [
    "ActivationQuantizer",
    "PackedModule",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "cached_weights",
    "observe_activations",
]
