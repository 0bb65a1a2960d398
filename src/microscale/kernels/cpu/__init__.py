"""The compiled CPU kernels: C++ over AVX2, AVX-512 or portable vectors, called with raw pointers."""

import torch

from microscale.formats import Format
from microscale.formats.dtypes import FLOAT_DTYPES
from microscale.kernels.backend import Backend, Operation, Request, by_operation
from microscale.kernels.cpu import decoder, native
from microscale.kernels.cpu.fused import (
    gather_quantize,
    hadamard,
    hadamard_quantize,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)
from microscale.kernels.cpu.layout import to_layout
from microscale.kernels.cpu.linear import describe_linear, linear, linear_mixed, linear_refusal
from microscale.kernels.cpu.quantize import dequantize, dequantize_refusal, fake_quantize, quantize, quantize_refusal
from microscale.kernels.cpu.rows16 import LAYOUT as ROWS16
from microscale.layouts.row_major import NAME as ROW_MAJOR


def _why_not(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"runs on the CPU only, not on {request.device}"
    if request.operation is Operation.TO_LAYOUT:
        packs = (request.layout, request.target) == (ROW_MAJOR, ROWS16.name)
        return None if packs else f"packs {ROW_MAJOR} into {ROWS16.name} only"
    if request.dtype not in FLOAT_DTYPES:
        return f"takes float32, bfloat16 and float16 only, not {request.dtype}"
    if request.operation in decoder.IMPLEMENTATIONS:
        return decoder.decoder_refusal(request)
    if request.operation in (Operation.LINEAR, Operation.LINEAR_MIXED):
        if request.records_gradient:
            return "does not record gradients"
        return linear_refusal(request.layout, request.format, request.activations)
    if request.layout != ROW_MAJOR:
        return f"reads the layout {ROW_MAJOR} only, not {request.layout}"
    if request.format is None:
        return None
    if request.operation is Operation.DEQUANTIZE:
        return dequantize_refusal(request.format)
    return quantize_refusal(request.format)


def _wanted_layout(fmt: Format, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    return ROWS16.name if device.type == "cpu" and dtype in FLOAT_DTYPES else None


BACKEND = Backend(
    name=decoder.NAME,
    title="CPU kernels",
    rank=10,
    implementations=by_operation(
        (quantize, dequantize, fake_quantize, to_layout, linear, linear_mixed, rms_norm, silu_mul, hadamard),
        (rms_norm_quantize, silu_mul_quantize, gather_quantize, hadamard_quantize),
    )
    | decoder.IMPLEMENTATIONS,
    why_not=_why_not,
    layouts=(ROWS16,),
    wanted_layout=_wanted_layout,
    unavailable=lambda: native.UNAVAILABLE,
    level=native.level_name,
    advice=lambda: native.UNAVAILABLE,
    cache_layout=decoder.CACHE,
    bind=decoder.bind,
    describe=describe_linear,
)
