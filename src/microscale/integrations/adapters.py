"""Directories of PEFT: a low-rank adapter (LoRA) and the name of its base, merged into float weights.

Source: arXiv 2106.09685, W + (alpha / r) B A; with ``use_rslora`` alpha / sqrt(r) (arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from microscale.checkpoint.reader import read_all, read_json
from microscale.errors import CheckpointError, ModelError, QuantizationNote, counted

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
CHANGES = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "weights kept as [in, out]",
    "megatron_config": "Megatron's layers",
    "lora_bias": "biases that were learned",
}
"""Settings that make more of an adapter than B A, and their names."""


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter and no model of its own."""
    return (Path(path) / CONFIG).exists() and not (Path(path) / "config.json").exists()


def base_of(path: str | Path) -> str:
    """Return where the base of an adapter lies.

    Raises:
        ModelError: another kind of adapter, or no name of a base.
    """
    config = read_json(Path(path) / CONFIG)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    changed = [name for word, name in CHANGES.items() if config.get(word)]
    if kind != "LORA" or changed:
        what = ", ".join(changed) or f"peft_type {kind!r}"
        raise ModelError(f"{path} is an adapter with {what}, which is not merged here; merge it with PEFT first")
    if not base:
        raise ModelError(f"{path} is an adapter that names no base model; merge it with PEFT first")
    beside = Path(path).parent / str(base)
    return str(base) if Path(str(base)).is_absolute() or not beside.is_dir() else str(beside)


@torch.no_grad()
def merge_adapter(model: Any, path: str | Path) -> Any:
    """Add an adapter to the float weights of its base; returns the model, which is changed in place.

    Raises:
        CheckpointError: no weights, or such as do not fit.
        ModelError: a layer that the base does not have.
    """
    config = read_json(Path(path) / CONFIG)
    tensors = read_all(Path(path) / WEIGHTS)
    merged = 0
    for name, down in tensors.items():
        key = name.removeprefix(PREFIX)
        if key.endswith(".lora_B.weight"):
            continue
        place, found = _place(model, key, path)
        if not key.endswith(".lora_A.weight"):
            place.copy_(_fitting(down, place, key))
            continue
        up = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if up is None or up.shape[1] != down.shape[0]:
            raise CheckpointError(f"{path}: {name} has no lora_B that fits")
        change = up.to(torch.float32) @ down.to(torch.float32) * scaling(config, found, down.shape[0])
        place.copy_((place.to(torch.float32) + _fitting(change, place, key)).to(place.dtype))
        merged += 1
    warnings.warn(
        f"the adapter of {path} is merged into {counted(merged, 'layer')} of {config['base_model_name_or_path']}",
        QuantizationNote,
        stacklevel=3,
    )
    return model


def scaling(config: dict[str, Any], layer: str, rank: int) -> float:
    """Return the factor of B A for a layer: alpha over the rank or its root; patterns give layers their own alpha."""
    alpha = float(config.get("lora_alpha", rank))
    patterns = cast("dict[str, float]", config.get("alpha_pattern") or {})
    own = next((value for pattern, value in patterns.items() if re.search(rf"(^|\.){pattern}$", layer)), alpha)
    return float(own) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _place(model: nn.Module, key: str, path: str | Path) -> tuple[Tensor, str]:
    """Return the weight that a tensor of an adapter belongs to, and the name of its layer."""
    layer = re.sub(r"\.(lora_A|lora_B)\.weight$|\.weight$|\.modules_to_save\.weight$", "", key)
    parameters = dict(model.named_parameters())
    for name in (f"{layer}.weight", key):
        if name in parameters:
            return parameters[name].data, layer
    raise ModelError(f"{path} changes {layer!r}, which the base model does not have: is it another base?")


def _fitting(values: Tensor, place: Tensor, key: str) -> Tensor:
    if values.shape != place.shape:
        raise CheckpointError(f"{key} is of shape {list(values.shape)}, the base's weight {list(place.shape)}")
    return values.to(device=place.device)
