"""Weights of GPTQ, AWQ and bitsandbytes files as the float weights that they stand for; see :mod:`float_weights`.

Sources of the layouts: AutoGPTQ (``qzeros`` are stored less one, but not under ``gptq_v2``), AutoAWQ's GEMM version
(eight values of a word in the order 0 2 4 6 1 3 5 7), bitsandbytes' serialized 4-bit state and LLM.int8().
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from microscale.checkpoint.float_weights import FloatWeight, Load, unpacked
from microscale.checkpoint.schema import TensorInfo
from microscale.errors import CheckpointError

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ each of eight values lies, in units of four bits."""
STATE = ".quant_state.bitsandbytes__"
"""Before the kind of numbers (nf4, fp4) in the name of the tensor with a weight's shape and blocks, as JSON."""


def gptq_weights(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, FloatWeight]:
    """Find layers of GPTQ: ``qweight`` [cols * bits / 32, rows], ``scales`` [groups, rows], ``qzeros``, ``g_idx``.

    Raises:
        CheckpointError: a width in bits that does not fill words of 32 bits evenly, or missing tensors.
    """
    bits = int(config.get("bits", 4))
    if bits not in (2, 4, 8):
        raise CheckpointError(f"GPTQ with {bits} bits is not read; 2, 4 and 8 bits are")
    offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    found: dict[str, FloatWeight] = {}
    for base in _layers(infos, "qweight", ("scales", "qzeros")):
        words, rows = infos[f"{base}.qweight"].shape
        cols = words * 32 // bits
        parts = [f"{base}.{end}" for end in ("qweight", "scales", "qzeros", "g_idx") if f"{base}.{end}" in infos]

        def make(load: Load, base: str = base, cols: int = cols, has_order: bool = len(parts) == 4) -> Tensor:
            values = unpacked(load(f"{base}.qweight").T.contiguous(), bits)
            scales = load(f"{base}.scales").to(torch.float32)
            zeros = (unpacked(load(f"{base}.qzeros"), bits)[:, : scales.shape[1]] + offset) & (2**bits - 1)
            group = load(f"{base}.g_idx").to(torch.int64) if has_order else torch.arange(cols) // (cols // len(scales))
            return (values - zeros.T[:, group]).to(torch.float32) * scales.T[:, group]

        found[f"{base}.weight"] = FloatWeight(shape=(rows, cols), parts=tuple(parts), make=make)
    return found


def awq_weights(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, FloatWeight]:
    """Find layers of AWQ: ``qweight`` [cols, rows / 8], ``scales`` [groups, rows], ``qzeros`` [groups, rows / 8].

    Raises:
        CheckpointError: another version than GEMM, another width than 4 bits, or missing tensors.
    """
    version, bits = str(config.get("version", "gemm")).lower(), int(config.get("bits", 4))
    if version != "gemm" or bits != 4:
        raise CheckpointError(f"AWQ of version {version!r} with {bits} bits is not read; version 'gemm' with 4 bits is")
    found: dict[str, FloatWeight] = {}
    for base in _layers(infos, "qweight", ("scales", "qzeros")):
        cols, words = infos[f"{base}.qweight"].shape

        def make(load: Load, base: str = base, cols: int = cols) -> Tensor:
            values, zeros = (_awq_values(load(f"{base}.{end}")) for end in ("qweight", "qzeros"))
            scales = load(f"{base}.scales").to(torch.float32)
            group = torch.arange(cols) // (cols // len(scales))
            return ((values - zeros[group]).to(torch.float32) * scales[group]).T.contiguous()

        parts = tuple(f"{base}.{end}" for end in ("qweight", "scales", "qzeros"))
        found[f"{base}.weight"] = FloatWeight(shape=(words * 8, cols), parts=parts, make=make)
    return found


def _awq_values(words: Tensor) -> Tensor:
    return unpacked(words, 4).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2)


def _layers(infos: Mapping[str, TensorInfo], packed: str, others: tuple[str, ...]) -> list[str]:
    bases = [name.removesuffix(f".{packed}") for name in infos if name.endswith(f".{packed}")]
    for base in bases:
        absent = next((f"{base}.{end}" for end in others if f"{base}.{end}" not in infos), None)
        if absent is not None:
            raise CheckpointError(f"layer {base!r} has no tensor {absent!r}; the checkpoint is incomplete")
    return bases


def bitsandbytes_weights(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, FloatWeight]:
    """Find layers of bitsandbytes: NF4 and FP4 by the state in the file, LLM.int8() by its scales of rows (``SCB``).

    Raises:
        CheckpointError: a state that cannot be read is refused when its weight is.
    """
    del config  # the file says it all
    found: dict[str, FloatWeight] = {}
    for name, info in infos.items():
        base, _, kind = name.partition(STATE)
        if kind:
            ends = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
            parts = (base, *(f"{base}.{end}" for end in ends if f"{base}.{end}" in infos), name)
            found[base] = FloatWeight(
                shape=(), parts=parts, make=lambda load, base=base, name=name: _four_bit_state(load, base, name)
            )
        elif name.endswith(".weight") and info.dtype == torch.int8 and (scale := f"{name[:-6]}SCB") in infos:
            marker = f"{name[:-6]}weight_format"
            parts = (name, scale, *((marker,) if marker in infos else ()))
            found[name] = FloatWeight(
                shape=info.shape,
                parts=parts,
                make=lambda load, name=name, scale=scale: (
                    load(name).to(torch.float32) * (load(scale).to(torch.float32) / 127.0).unsqueeze(-1)
                ),
            )
    return found


def state_shape(load: Load, weight: FloatWeight) -> tuple[int, ...]:
    """Return the shape of a weight whose file says it in a state of its own.

    Raises:
        CheckpointError: no such state.
    """
    return tuple(int(length) for length in _state(load, weight.parts[-1])["shape"])


def _state(load: Load, name: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(load(name).tolist()).decode("utf-8"))
        if isinstance(state, dict) and {"shape", "blocksize"} <= cast("dict[str, Any]", state).keys():
            return cast("dict[str, Any]", state)
    except (ValueError, UnicodeDecodeError):
        pass
    raise CheckpointError(f"tensor {name!r} holds no state of bitsandbytes; the checkpoint is damaged")


def _four_bit_state(load: Load, base: str, name: str) -> Tensor:
    """Return code numbers times the largest of their block; these largest ones can be stored in 8 bits themselves."""
    state = _state(load, name)
    packed = load(base).reshape(-1).to(torch.int64)
    codes = torch.stack((packed >> 4, packed & 15), -1).reshape(-1)
    absmax = load(f"{base}.absmax")
    if "nested_blocksize" in state:
        table = load(f"{base}.nested_quant_map").to(torch.float32)
        size = int(state["nested_blocksize"])
        whole = load(f"{base}.nested_absmax").to(torch.float32).repeat_interleave(size)[: absmax.numel()]
        absmax = table[absmax.reshape(-1).to(torch.int64)] * whole + float(state["nested_offset"])
    values = load(f"{base}.quant_map").to(torch.float32)[codes]
    shape = tuple(int(length) for length in state["shape"])
    count = math.prod(shape)
    factor = absmax.to(torch.float32).reshape(-1).repeat_interleave(int(state["blocksize"]))[:count]
    if values.numel() < count or factor.numel() < count:
        raise CheckpointError(f"tensor {base!r} is too small for the shape {list(shape)} of its state")
    return (values[:count] * factor).reshape(shape)
