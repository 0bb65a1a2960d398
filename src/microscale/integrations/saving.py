"""Save whole quantized models through transformers, atomically, in any of our file layouts."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from microscale.checkpoint.compressed_tensors import INPUT_SCALE, CompressedTensorsLayout, input_global_scale
from microscale.checkpoint.gpt_oss import GptOssLayout
from microscale.checkpoint.native import NativeLayout, range_name
from microscale.checkpoint.reader import read_json
from microscale.checkpoint.registry import choose_layout, describe_layers
from microscale.checkpoint.schema import FileLayout
from microscale.checkpoint.writer import write_directory, write_json
from microscale.errors import (
    ArgumentError,
    CheckpointWriteError,
    LayoutError,
    ModelError,
    QuantizationNote,
    check_kind,
    check_path,
    counted,
    shown,
)
from microscale.families.modules import is_transposed
from microscale.integrations.beside import copy_beside, source_directory
from microscale.integrations.cache_scales import rounding_entry
from microscale.integrations.card import model_card
from microscale.integrations.checking import UnreadableError, check_readable
from microscale.integrations.hf_quantizer import MicroscaleConfig, register
from microscale.integrations.packed_experts import JoinedStack, joined_stacks
from microscale.integrations.places import leftover_of
from microscale.layer_spec import LayerSpec
from microscale.nn.attention_setting import attention_entry
from microscale.nn.experts import Experts
from microscale.nn.inference import row_major_weights
from microscale.nn.packed import PackedModule
from microscale.recipes.obstacles import ATTENTION_OBSTACLE, layout_obstacle
from microscale.version import __version__


def stored_layers_of(model: nn.Module) -> dict[str, LayerSpec]:
    """Describe the packed modules of a model, and say which use the weight of another one."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    names = {module: name for name, module in packed.items()}
    specs = {name: module.layer_spec(name) for name, module in packed.items()}
    return {
        name: dataclasses.replace(spec, tied_to=names[packed[name].holder]) if packed[name].is_tied else spec
        for name, spec in specs.items()
    }


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
    model.config.quantization_config = MicroscaleConfig(**described, **rounding_entry(model))
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
    check: bool = True,
    about: Sequence[str] = (),
) -> str:
    """Write a quantized model atomically as a Hugging Face directory; returns the name of the layout written.

    All files that lie beside the weights of the model's source are copied (processors, templates, code), and tensors
    that the model had no place for. ``check``: transformers opens the directory before it takes its name; what it
    cannot load in the layout of another tool is written in ours where the layout is ``auto``, with a note. README.md
    is a model card, in which ``about`` are lines on how the model was made.

    Raises:
        LayoutError: the layout cannot hold a layer.
        CheckpointWriteError: the target exists, or writing failed, or what was written cannot be loaded; nothing
            half-written is left.
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
    obstacle = layout_obstacle(model, layout, layers) or (None if layout == "quark" else _unmeasured(model, layers))
    chosen = choose_layout(layout, list(layers.values()), obstacle)
    if attention_entry(model) and not isinstance(chosen, NativeLayout):
        raise LayoutError(f"layout {chosen.name} cannot hold this model: {ATTENTION_OBSTACLE}; use layout microscale")
    writing = _Writing(
        model=model, layers=layers, tokenizer=tokenizer, max_shard_size=max_shard_size, check=check, about=tuple(about)
    )
    with row_major_weights(model):
        try:
            write_directory(target, lambda place: writing.fill(place, chosen), overwrite=overwrite)
        except UnreadableError as error:
            if layout != "auto" or isinstance(chosen, NativeLayout):
                raise
            warnings.warn(f"written in layout microscale: {error}", QuantizationNote, stacklevel=2)
            chosen = NativeLayout()
            write_directory(target, lambda place: writing.fill(place, chosen), overwrite=overwrite)
    return chosen.name


def _unmeasured(model: Any, layers: Mapping[str, LayerSpec]) -> str | None:
    """Return why static ranges keep a model out of compressed-tensors: none was measured. A few may be absent."""
    names = [name for layer in layers.values() if (name := range_name(layer)) is not None]
    absent = [name for name in names if bool(torch.isnan(model.get_buffer(name)).any())]
    if absent and len(absent) == len(names):
        return "no range of its inputs is measured yet: give --calibration FILE"
    return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Writing:
    """A model that is written, in a layout that is tried."""

    model: Any
    layers: Mapping[str, LayerSpec]
    tokenizer: Any
    max_shard_size: str
    check: bool
    about: tuple[str, ...]

    def fill(self, directory: Path, layout: FileLayout) -> None:
        """Write everything into a directory."""
        model, leftover = self.model, leftover_of(self.model)
        is_stacked = isinstance(layout, GptOssLayout)
        stacks = joined_stacks(model, self.layers) if is_stacked else []
        layers = [stack.layer for stack in stacks] or list(self.layers.values())
        state = _packed_state(model, layout, {} if is_stacked else self.layers)
        if leftover is not None:
            state.update(leftover.load())
        if is_stacked:
            state = _stacked_state(state, layout, stacks)
        _save_pretrained(model, directory, state, self.max_shard_size)
        source = source_directory(model)
        is_copied = source is not None and _is_of(self.tokenizer, source)
        if self.tokenizer is not None and not is_copied:
            self.tokenizer.save_pretrained(directory)
        if source is not None:
            copy_beside(source, directory)
        unquantized = [*unquantized_linears(model), *(leftover.linears if leftover is not None else ())]
        config = read_json(directory / "config.json")
        config["quantization_config"] = {**layout.config(layers, unquantized), **rounding_entry(model)}
        config["microscale"] = describe_layers(
            layers, layout.name, __version__, torch.bfloat16 if is_stacked else model.dtype
        )
        if not isinstance(layout, NativeLayout):
            config["dtype"] = "bfloat16"
        write_json(directory / "config.json", config)
        card = model_card(model, self.layers, layout.name, self.about)
        (directory / "README.md").write_text(card, encoding="utf-8")
        if self.check:
            check_readable(directory, layout.name, () if leftover is None else leftover.names)


def _is_of(tokenizer: Any, source: Path) -> bool:
    """Whether a tokenizer is the one whose files lie in a directory."""
    place = Path(str(getattr(tokenizer, "name_or_path", "") or "."))
    return place.is_dir() and place.resolve() == source.resolve() and (source / "tokenizer_config.json").exists()


def _packed_state(model: Any, layout: FileLayout, layers: Mapping[str, LayerSpec]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = dict(model.state_dict())
    native = NativeLayout()
    for name, layer in layers.items():
        module = model.get_submodule(name)
        assert isinstance(module, PackedModule)
        for own in native.tensor_names(layer):
            del state[own]
        state.update(layout.pack(layer, module.tensor))
        own_range = range_name(layer)
        if own_range is not None and isinstance(layout, CompressedTensorsLayout):
            state[f"{name}.{INPUT_SCALE}"] = input_global_scale(state.pop(own_range))
    return state


def _stacked_state(state: Mapping[str, Tensor], layout: FileLayout, stacks: Sequence[JoinedStack]) -> dict[str, Tensor]:
    """Return the state with experts stacked and all floats in bfloat16, with a note where that rounds them."""
    inside = tuple(f"{name}." for stack in stacks for name in stack.members)
    kept = {name: value for name, value in state.items() if not name.startswith(inside)}
    for stack in stacks:
        kept.update(layout.pack(stack.layer, stack.tensor()))
        bias = stack.bias()
        kept.update({} if bias is None else {f"{stack.layer.name}_bias": bias})
    rounded = {name: value.to(torch.bfloat16) for name, value in kept.items() if value.is_floating_point()}
    changed = [name for name, value in rounded.items() if bool((value != kept[name]).any())]
    if changed:
        what = f"{counted(len(changed), 'tensor')} that stay floats, e.g. {changed[0]}"
        warnings.warn(f"layout {layout.name} holds bfloat16: {what}, are rounded to it", QuantizationNote, stacklevel=2)
    return {**kept, **rounded}


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
