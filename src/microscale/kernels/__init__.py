"""How numbers are computed: one contract for each operation, several backends, a dispatcher that explains itself."""

from microscale.kernels.backend import Backend, Operation, Request
from microscale.kernels.decoder_ops import largest_index, make_cache
from microscale.kernels.dispatch import BACKENDS, add_backend, count_executions, remove_backend, why_not
from microscale.kernels.layout import is_at_home, preferred_layout, to_layout
from microscale.kernels.operands import Combine, Gate, KeyValueCache, Rotation, WeightGroup
from microscale.kernels.ops import (
    dequantize,
    fake_quantize,
    gather_quantize,
    hadamard,
    hadamard_quantize,
    linear,
    linear_mixed,
    quantize,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)
from microscale.kernels.plan import BoundPlan, bind

__all__ = [
    "BACKENDS",
    "Backend",
    "BoundPlan",
    "Combine",
    "Gate",
    "KeyValueCache",
    "Operation",
    "Request",
    "Rotation",
    "WeightGroup",
    "add_backend",
    "bind",
    "count_executions",
    "dequantize",
    "fake_quantize",
    "gather_quantize",
    "hadamard",
    "hadamard_quantize",
    "is_at_home",
    "largest_index",
    "linear",
    "linear_mixed",
    "make_cache",
    "preferred_layout",
    "quantize",
    "remove_backend",
    "rms_norm",
    "rms_norm_quantize",
    "silu_mul",
    "silu_mul_quantize",
    "to_layout",
    "why_not",
]
