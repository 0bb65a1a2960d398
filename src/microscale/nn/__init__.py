"""Modules that hold packed weights and call the kernels."""

from microscale.nn.activation import ActivationQuantizer, observe_activations
from microscale.nn.embedding import NarrowEmbedding, QuantizedEmbedding
from microscale.nn.experts import Expert, Experts, has_stacked_experts, why_not_unstacked
from microscale.nn.inference import cached_weights, lay_out, prepare_for_inference, row_major_weights
from microscale.nn.linear import QuantizedLinear
from microscale.nn.online import InputTransforms, LowRank
from microscale.nn.packed import PackedModule

__all__ = [
    "ActivationQuantizer",
    "Expert",
    "Experts",
    "InputTransforms",
    "LowRank",
    "NarrowEmbedding",
    "PackedModule",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "cached_weights",
    "has_stacked_experts",
    "lay_out",
    "observe_activations",
    "prepare_for_inference",
    "row_major_weights",
    "why_not_unstacked",
]
