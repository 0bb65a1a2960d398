"""Save whole quantized models through transformers, atomically, in any of our file layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from microscale.checkpoint.native import NativeLayout
from microscale.checkpoint.reader import read_json
from microscale.checkpoint.registry import choose_layout, describe_layers
from microscale.checkpoint.schema import FileLayout
from microscale.checkpoint.writer import write_directory, write_json
from microscale.errors import (
    ArgumentError,
    CheckpointWriteError,
    LayoutError,
    ModelError,
    check_kind,
    check_path,
    shown,
)
from microscale.families.modules import is_transposed
from microscale.integrations.hf_quantizer import MicroscaleConfig, register
from microscale.layer_spec import LayerSpec
from microscale.nn.attention_setting import attention_entry
from microscale.nn.experts import Experts
from microscale.nn.inference import row_major_weights
from microscale.nn.packed import PackedModule
from microscale.recipes.plan import ATTENTION_OBSTACLE, layout_obstacle
from microscale.version import __version__


def stored_layers_of(model: nn.Module) -> dict[str, LayerSpec]:
    """Describe the packed modules of a model."""
    modules = model.named_modules()
    return {name: module.layer_spec(name) for name, module in modules if isinstance(module, PackedModule)}


def unquantized_linears(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that still have float weights, routers of experts among them."""
    found: list[str] = []
    beside_experts: set[nn.Module] = set()
    for name, module in model.named_modules():
        children = list(module.children())
        if any(isinstance(child, Experts) for child in children):
            beside_experts.update(children)
        is_router = module in beside_experts and {key for key, _ in module.named_parameters()} == {"weight"}
        if isinstance(module, nn.Linear) or is_transposed(module) or is_router:
            found.append(name)
    return found


def keep_module_names(model: Any) -> None:
    """Make save_pretrained write tensors under the names of the model's modules, which quantization_config has.

    transformers 5 gives some families other names in files, and fits them to experts that are stacked; it reads both.
    """
    model._weight_conversions = []


def mark_quantized(model: Any) -> None:
    """Put our quantization_config and the ``microscale`` object into the model's config, for save_pretrained."""
    register()
    keep_module_names(model)
    layers = stored_layers_of(model)
    described = NativeLayout().config(list(layers.values()), unquantized_linears(model))
    model.config.quantization_config = MicroscaleConfig(**described, **attention_entry(model))
    model.config.microscale = describe_layers(list(layers.values()), "microscale", __version__, model.dtype)


def check_shard_size(word: str) -> None:
    """Refuse what is no size of a file.

    Raises:
        CheckpointWriteError: not a positive number with a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB|TB)", word.upper())
    if match is None or float(match[1]) == 0:
        raise CheckpointWriteError(f"a shard size reads like 5GB or 200MB (units KB, MB, GB, TB), got {word!r}")


def save_model(
    model: Any,
    target: str | Path,
    *,
    layout: str = "auto",
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> str:
    """Write a quantized model atomically as a Hugging Face directory; returns the name of the layout written.

    Raises:
        LayoutError: the layout cannot hold a layer.
        CheckpointWriteError: the target exists, or writing failed; nothing half-written is left.
    """
    check_kind(model, nn.Module, "the model", "a torch module", error=ModelError)
    check_path(target, "the directory to write", "a path")
    check_kind(layout, str, "the layout", "a text such as 'auto' or 'microscale'")
    check_kind(overwrite, bool, "overwrite", "True or False")
    check_kind(max_shard_size, str, "the largest file", "a text such as '5GB'")
    if tokenizer is not None and (
        isinstance(tokenizer, type) or not callable(getattr(tokenizer, "save_pretrained", 0))
    ):
        raise ArgumentError(
            "the tokenizer must be a loaded one, such as microscale.load_tokenizer(PATH) returns,"
            f" got {shown(tokenizer)}"
        )
    check_shard_size(max_shard_size)
    layers = stored_layers_of(model)
    if not layers:
        raise ModelError("the model has no quantized layers; quantize it first, or use its own save_pretrained")
    chosen = choose_layout(layout, list(layers.values()), layout_obstacle(model, layout, layers))
    attention = attention_entry(model)
    if attention and not isinstance(chosen, NativeLayout):
        raise LayoutError(f"layout {chosen.name} cannot hold this model: {ATTENTION_OBSTACLE}; use layout microscale")
    quantization = {**chosen.config(list(layers.values()), unquantized_linears(model)), **attention}
    note = describe_layers(list(layers.values()), chosen.name, __version__, model.dtype)

    def fill(directory: Path) -> None:
        _save_pretrained(model, directory, _packed_state(model, chosen, layers), max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        config = read_json(directory / "config.json")
        config["quantization_config"] = quantization
        config["microscale"] = note
        if not isinstance(chosen, NativeLayout):
            config["dtype"] = "bfloat16"
        write_json(directory / "config.json", config)

    with row_major_weights(model):
        write_directory(target, fill, overwrite=overwrite)
    return chosen.name


def _packed_state(model: Any, layout: FileLayout, layers: Mapping[str, LayerSpec]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = dict(model.state_dict())
    native = NativeLayout()
    for name, layer in layers.items():
        module = model.get_submodule(name)
        assert isinstance(module, PackedModule)
        for own in native.tensor_names(layer):
            del state[own]
        state.update(layout.pack(layer, module.tensor))
    return state


def _save_pretrained(model: Any, directory: Path, state: dict[str, Tensor], max_shard_size: str) -> None:
    """Call save_pretrained with our state dict; a quantizer left from loading would replace it."""
    quantizer = getattr(model, "hf_quantizer", None)
    config_before = getattr(model.config, "quantization_config", None)
    bar_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        if quantizer is not None:
            model.hf_quantizer = None
        if config_before is not None:
            del model.config.quantization_config
        keep_module_names(model)
        model.save_pretrained(directory, state_dict=state, max_shard_size=max_shard_size)
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
        if config_before is not None:
            model.config.quantization_config = config_before
        if bar_enabled:
            transformers_logging.enable_progress_bar()
