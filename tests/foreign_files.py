"""Directories as other tools write them: the linear layers of a model in their formats, each with the floats it means.

Each writer takes a weight [rows, cols] and returns the tensors of a layer by the ends of their names, and what they
stand for. They are written from the tools' descriptions, apart from what microscale reads them with.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from small_models import edit_config, read_tensors

Written = tuple[dict[str, Tensor], Tensor]
"""The tensors of a layer by the ends of their names, and the weight that they stand for."""


def fp8_blocks(weight: Tensor, size: int = 128) -> Written:
    rows, cols = weight.shape
    codes, scales = (
        torch.empty(weight.shape, dtype=torch.float8_e4m3fn),
        torch.empty(-(-rows // size), -(-cols // size)),
    )
    meant = torch.empty(weight.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            scales[i, j] = weight[at].float().abs().max() / 448
            codes[at] = (weight[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
            meant[at] = codes[at].float() * scales[i, j]
    return {"weight": codes, "weight_scale_inv": scales}, meant


def fp8_tensor(weight: Tensor) -> Written:
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    return parts, codes.float() * scale


def fp8_rows(weight: Tensor) -> Written:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def int8_rows(weight: Tensor) -> Written:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    codes = torch.round(weight.float() / scale).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def words(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack unsigned integers [n, m] into int32 [n, m * bits / 32]; value ``order[k]`` of a word lies k-th lowest."""
    each = 32 // bits
    groups = values.to(torch.int64).unflatten(1, (-1, each))
    total = torch.zeros(groups.shape[:2], dtype=torch.int64)
    for k in range(each):
        total += groups[..., k if order is None else order[k]] << (bits * k)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def _affine(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes [rows, cols], scales and zero points [rows, groups], and the weight that they stand for."""
    blocks = weight.float().unflatten(1, (-1, group))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = torch.round(-low / scale).clamp(1, 2**bits - 1)
    codes = (torch.round(blocks / scale) + zero).clamp(0, 2**bits - 1)
    return codes.flatten(1), scale.squeeze(-1), zero.squeeze(-1), ((codes - zero) * scale).flatten(1)


def gptq(weight: Tensor, *, bits: int = 4, less_one: int = 1, shuffled: bool = False) -> Written:
    cols, group = weight.shape[1], 32
    order = torch.randperm(cols, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(cols)
    codes, scale, zero, sorted_meant = _affine(weight[:, order], bits, group)
    own, meant = torch.empty_like(codes), torch.empty_like(sorted_meant)
    own[:, order], meant[:, order] = codes, sorted_meant
    place = torch.empty(cols, dtype=torch.int32)
    place[order] = (torch.arange(cols) // group).to(torch.int32)
    return {
        "qweight": words(own, bits).T.contiguous(),
        "qzeros": words((zero - less_one).T.contiguous(), bits),
        "scales": scale.T.contiguous().half(),
        "g_idx": place,
    }, meant


AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring values lies k-th lowest in a word of AWQ."""


def awq(weight: Tensor) -> Written:
    codes, scale, zero, meant = _affine(weight, 4, 32)
    return {
        "qweight": words(codes.T.contiguous(), 4, AWQ),
        "qzeros": words(zero.T.contiguous(), 4, AWQ),
        "scales": scale.T.contiguous().half(),
    }, meant


NF4 = torch.tensor(
    [
        *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
        *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
    ]
)


def nf4(weight: Tensor, *, nested: bool = False) -> Written:
    blocks = weight.float().reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    parts: dict[str, Tensor] = {}
    if nested:
        table, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
        whole = (absmax - offset).abs().reshape(-1)
        chunks = [whole[i : i + 256].max() for i in range(0, whole.numel(), 256)]
        largest = torch.stack(chunks)
        near = (absmax - offset) / largest.repeat_interleave(256)[: absmax.numel()]
        coded = (near[:, None] - table).abs().argmin(1).to(torch.uint8)
        absmax = table[coded.long()] * largest.repeat_interleave(256)[: absmax.numel()] + offset
        parts = {"weight.absmax": coded, "weight.nested_absmax": largest, "weight.nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
    else:
        parts = {"weight.absmax": absmax}
    codes = ((blocks / absmax[:, None])[..., None] - NF4).abs().argmin(-1).reshape(-1)
    parts["weight"] = ((codes[0::2] << 4) | codes[1::2]).to(torch.uint8).unsqueeze(1)
    parts["weight.quant_map"] = NF4
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return parts, (NF4[codes].reshape(-1, 64) * absmax[:, None]).reshape(weight.shape)


def llm_int8(weight: Tensor) -> Written:
    largest = weight.float().abs().amax(1)
    codes = torch.round(weight.float() * 127 / largest[:, None]).to(torch.int8)
    return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}, (
        codes.float() * (largest / 127)[:, None]
    )


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def modelopt_nvfp4(weight: Tensor) -> Written:
    second = weight.float().abs().max() / (6 * 448)
    blocks = weight.float().unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(-1) / 6 / second).to(torch.float8_e4m3fn)
    factor = (scale.float() * second).unsqueeze(-1)
    ratio = blocks / factor
    nearest = (ratio.abs()[..., None] - E2M1).abs().argmin(-1)
    meant = (E2M1[nearest] * ratio.sign() * factor).flatten(1)
    codes = (nearest + 8 * (ratio < 0)).flatten(1).to(torch.uint8)
    return {
        "weight": codes[:, 0::2] | (codes[:, 1::2] << 4),
        "weight_scale": scale,
        "weight_scale_2": second,
        "input_scale": torch.tensor(0.01),
    }, meant


def write_foreign(
    source: Path,
    target: Path,
    writer: Callable[[Tensor], Written],
    config: Mapping[str, Any] | None,
    *,
    dtype: str = "bfloat16",
) -> dict[str, Tensor]:
    """Copy a model's directory with its linear layers in another tool's format; returns the weights that are meant."""
    shutil.copytree(source, target)
    tensors, meant = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in read_tensors(source).items():
        if name.endswith("_proj.weight"):
            parts, meant[name] = writer(value)
            base = name.removesuffix("weight")
            tensors |= {base + end: part.contiguous().clone() for end, part in parts.items()}
        else:
            tensors[name] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    edit_config(target, dtype=dtype, **({} if config is None else {"quantization_config": dict(config)}))
    assert math.prod(next(iter(meant.values())).shape) > 0
    return meant
