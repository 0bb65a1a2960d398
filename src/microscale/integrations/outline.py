"""The model that loading a checkpoint would give, without its weights: they lie on ``meta``, only headers are read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from microscale.checkpoint.gguf_file import read_gguf
from microscale.checkpoint.native import NativeLayout
from microscale.checkpoint.reader import CheckpointReader
from microscale.checkpoint.registry import read_stored_layers
from microscale.errors import ModelError
from microscale.integrations.attention import apply_attention
from microscale.integrations.cache_scales import SCHEME, CacheScheme, read_rounding, usable_scheme
from microscale.integrations.hf_quantizer import MicroscaleConfig, MicroscaleQuantizer, note_requested
from microscale.integrations.hub import check_local
from microscale.integrations.layerwise import outline_model
from microscale.integrations.loading import (
    LIBRARY_ERRORS,
    is_gguf,
    read_generation_config,
    read_model_config,
    settle_tying,
)
from microscale.integrations.model_class import class_of
from microscale.integrations.packed_experts import packed_stacks
from microscale.layer_spec import LayerSpec


def outline_checkpoint(path: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Return what :func:`microscale.load` would return, with all tensors on ``meta``.

    ``dtype`` is that of all that is not packed (default: the checkpoint's).

    Raises:
        CheckpointError, ModelError: missing, damaged, out of reach, or of a layout that we do not read.
    """
    if is_gguf(path):
        found = read_gguf(Path(path))
        config = read_model_config(path)
        return _packed_outline(config, dict(found.layers), dict.fromkeys(found.tensors), dtype or torch.bfloat16, None)
    local = check_local(path)
    reader = CheckpointReader(local) if local is not None and any(local.glob("*.safetensors*")) else None
    if reader is None or reader.quantization_config is None:
        read_model_config(path)  # says why it cannot be read
        model = outline_model(path)
        if model is None:
            raise ModelError(f"{path} cannot be built without its weights; load it, and explain the model")
        if local is not None:
            read_generation_config(model, local)
        return model.to(dtype or model.config.dtype or torch.float32)
    layout, layers = read_stored_layers(reader.config, reader.infos, reader.dtype)
    config = read_model_config(reader.path)
    own = config.quantization_config if isinstance(layout, NativeLayout) else None
    consumed = {name for layer in layers.values() for name in layout.tensor_names(layer)}
    others = dict.fromkeys(name for name in reader.infos if name not in consumed)
    scheme = usable_scheme(reader.quantization_config.get(SCHEME), reader) if own is None else None
    model = _packed_outline(config, layers, others, dtype or reader.dtype, own, scheme)
    note_requested(model, layout)
    read_generation_config(model, reader.path)
    return model


def _packed_outline(
    config: Any,
    layers: Mapping[str, LayerSpec],
    others: dict[str, Any],
    dtype: torch.dtype,
    own: dict[str, Any] | None,
    scheme: CacheScheme | None = None,
) -> Any:
    """Build the modules of a config, with packed ones where a checkpoint has them; ``own`` is our layout's entry."""
    stacks = packed_stacks(config, layers)
    packed = {name: layer for name, layer in layers.items() if layer.kind != "experts"}
    for stack in stacks.values():
        packed.update(stack.layers())
    if own is None:
        settle_tying(config, packed, others)
    described = MicroscaleConfig.from_layers(packed, []) if own is None else MicroscaleConfig(**own)
    if scheme is not None:
        described.set_entry(SCHEME, dict(scheme.words))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = class_of(config)._from_config(config, dtype=dtype).eval()
            if packed:
                MicroscaleQuantizer(described).put_modules(model)
        apply_attention(model, read_rounding(described.others))
    except LIBRARY_ERRORS as error:
        raise ModelError(f"the model cannot be built without its weights: {error}") from error
    return model
