"""How numbers are computed: one contract for each operation, several backends, a dispatcher that explains itself."""

from microscale.kernels.backend import Backend, Operation, Request
from microscale.kernels.dispatch import BACKENDS, add_backend, count_executions, note_execution, remove_backend, why_not
from microscale.kernels.layout import is_at_home, preferred_layout, to_layout
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

__all__ = [
    "BACKENDS",
    "Backend",
    "Operation",
    "Request",
    "add_backend",
    "count_executions",
    "dequantize",
    "fake_quantize",
    "gather_quantize",
    "hadamard",
    "hadamard_quantize",
    "is_at_home",
    "linear",
    "linear_mixed",
    "note_execution",
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
