"""Make a packed model a float one again, so that it can be quantized anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from microscale.layouts.row_major import NAME as ROW_MAJOR
from microscale.nn.embedding import QuantizedEmbedding, float_embedding
from microscale.nn.linear import QuantizedLinear
from microscale.nn.modules import keep_stored, replace_module
from microscale.nn.packed import PackedModule


@torch.no_grad()
def make_floats(model: Any, dtype: torch.dtype) -> int:
    """Put float modules in the place of packed ones; returns how many there were.

    A weight is that of the layer's own inputs: transforms and side paths go into it, the rounding of inputs is left
    out. Heads that use the table of an embedding use that of the float one. A float module remembers the packed weight
    that is its own, so that rounding it to nearest in the same format gives the same bits.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    floats: dict[PackedModule, nn.Module] = {}
    for name, module in sorted(packed.items(), key=lambda entry: entry[1].is_tied):
        made = _float_module(module, floats.get(module.holder) if module.is_tied else None, dtype)
        floats[module] = made
        if not module.is_tied and not _works_online(module):
            module.set_layout(ROW_MAJOR)
            keep_stored(made, module.tensor)
        replace_module(model, name, made)
    if any(module.is_tied for module in packed.values()):
        model.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    for place in (model, getattr(model, "config", None)):
        for mark in ("quantization_config", "microscale"):
            if hasattr(place, mark):
                delattr(place, mark)
    model.hf_quantizer, model.is_quantized = None, False
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_is_quantized", False):
            module.config._is_quantized = False
    return len(packed)


def _works_online(module: PackedModule) -> bool:
    """Whether a layer computes with more than its packed weight."""
    spec = module.layer_spec("")
    return bool(spec.transforms or spec.low_rank)


def _float_module(module: PackedModule, owner: nn.Module | None, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, QuantizedEmbedding):
        return float_embedding(module, dtype)
    assert isinstance(module, QuantizedLinear)
    weight = nn.Parameter(module.weight.to(dtype).contiguous(), requires_grad=False)
    bias = None if module.bias is None else nn.Parameter(module.bias.to(dtype), requires_grad=False)
    made: Any
    if module.kind == "conv1d":
        made = Conv1D(weight.shape[1], weight.shape[0])
        made.bias = bias if bias is not None else nn.Parameter(torch.zeros(weight.shape[1], dtype=dtype))
    else:
        with torch.device("meta"):
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        made.bias = bias
    made.weight = owner.weight if owner is not None else weight
    return made
