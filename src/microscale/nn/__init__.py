"""Modules that hold packed weights and call the kernels."""

from microscale.nn.activation import ActivationQuantizer, observe_activations
from microscale.nn.attention import rounded_attention
from microscale.nn.attention_setting import (
    AttentionFormats,
    attention_entry,
    attention_formats,
    model_attention,
    parse_attention,
    read_attention,
    set_attention_formats,
)
from microscale.nn.embedding import NarrowEmbedding, QuantizedEmbedding
from microscale.nn.experts import (
    Expert,
    Experts,
    has_stacked_experts,
    stacked_experts,
    unstack_experts,
    why_not_unstacked,
)
from microscale.nn.inference import cached_weights, freeze, lay_out, prepare_for_inference, row_major_weights
from microscale.nn.linear import QuantizedLinear
from microscale.nn.modules import float_weight, replace_module, untie
from microscale.nn.online import InputTransforms, LowRank
from microscale.nn.packed import PackedModule, Precision

__all__ = [
    "ActivationQuantizer",
    "AttentionFormats",
    "Expert",
    "Experts",
    "InputTransforms",
    "LowRank",
    "NarrowEmbedding",
    "PackedModule",
    "Precision",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "attention_entry",
    "attention_formats",
    "cached_weights",
    "float_weight",
    "freeze",
    "has_stacked_experts",
    "lay_out",
    "model_attention",
    "observe_activations",
    "parse_attention",
    "prepare_for_inference",
    "read_attention",
    "replace_module",
    "rounded_attention",
    "row_major_weights",
    "set_attention_formats",
    "stacked_experts",
    "unstack_experts",
    "untie",
    "why_not_unstacked",
]
