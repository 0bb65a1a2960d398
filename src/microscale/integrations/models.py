"""Load and save whole models through transformers: original checkpoints, our layout, and other tools' layouts.

Every quantized checkpoint becomes the same thing in memory: a transformers model whose linear layers are packed
modules. A checkpoint of another tool is translated tensor by tensor into the names of our layout first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from microscale.checkpoint import (
    CheckpointReader,
    FileLayout,
    StoredLayer,
    choose_layout,
    describe,
    read_json,
    read_stored_layers,
    write_directory,
    write_json,
)
from microscale.checkpoint.native import NativeLayout, range_name
from microscale.errors import CheckpointNotFoundError, DtypeError, MicroscaleError, ModelError, ShapeError
from microscale.formats import RangeKind
from microscale.integrations.hf_quantizer import MicroscaleConfig, register
from microscale.nn import PackedModule, QuantizedEmbedding, QuantizedLinear
from microscale.recipes import quantizable_modules

NVFP4_NUMERATOR = 448.0 * 6.0
"""compressed-tensors stores a static NVFP4 range as this number over amax."""


def check_local(path: str | Path) -> Path | None:
    """Return the path of a local model directory whose files are whole, None for what may be a hub name.

    Raises:
        CheckpointNotFoundError: a path that looks local and does not exist.
        CheckpointError: damaged files.
    """
    local = Path(path)
    if local.is_dir():
        if any(local.glob("*.safetensors*")) or not any(local.glob("*.bin")):
            CheckpointReader(local)
        else:
            read_json(local / "config.json")
        return local
    looks_local = local.exists() or str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1
    if looks_local or not str(path):
        raise CheckpointNotFoundError(
            f"{path} is not a model directory; give a directory with config.json, or a hub name"
        )
    return None


def _from_pretrained(path: str | Path | None, **options: Any) -> Any:
    """Call transformers, quietly, and turn what it raises into our classes."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    bar_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loader = cast(Any, AutoModelForCausalLM)
        if path is None:
            loader = loader._model_mapping[type(options["config"])]
        model, info = loader.from_pretrained(path, output_loading_info=True, **options)
    except MicroscaleError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError, json.JSONDecodeError) as error:
        raise ModelError(f"{path or 'the model'} cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(level)
        if bar_enabled:
            transformers_logging.enable_progress_bar()
    missing = sorted(str(name) for name in info.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{path or 'the checkpoint'} lacks {len(missing)} tensor(s) of the model, e.g. {missing[0]!r};"
            " they would be random numbers. The checkpoint is incomplete or of another architecture"
        )
    return model.eval()


def load_original(path: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Load an unquantized causal language model from a directory or by hub name.

    Raises:
        CheckpointError, ModelError: missing, damaged, quantized already, or not a causal language model.
    """
    local = check_local(path)
    if local is not None and read_json(local / "config.json").get("quantization_config"):
        raise ModelError(f"{path} is quantized already; give the original model")
    return _from_pretrained(path, dtype=dtype or "auto")


def load_model(path: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Load a model, quantized or not, from a directory, a GGUF file or by hub name; packed weights stay packed.

    ``dtype`` is the float type of all that is not packed and of the computation (default: the checkpoint's).

    Raises:
        CheckpointError, ModelError: missing, damaged, or of a layout that we do not read.
    """
    register()
    local = check_local(path)
    if local is None:
        return _from_pretrained(path, dtype=dtype or "auto")
    reader = CheckpointReader(local) if any(local.glob("*.safetensors*")) else None
    if reader is None or reader.quantization_config is None:
        return _from_pretrained(path, dtype=dtype or "auto")
    layout, layers = read_stored_layers(reader.config, reader.infos, reader.dtype)
    if isinstance(layout, NativeLayout):
        return _from_pretrained(path, dtype=dtype or "auto")
    state = _translate(reader, layout, layers)
    return _load_state(local, reader, layers, state, dtype or reader.dtype)


def _translate(reader: CheckpointReader, layout: FileLayout, layers: Mapping[str, StoredLayer]) -> dict[str, Tensor]:
    """Return the state dict in the names of our layout."""
    native = NativeLayout()
    consumed = {name for layer in layers.values() for name in layout.tensor_names(layer)}
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        state.update(native.pack(layer, layout.unpack(layer, reader.load)))
        static = range_name(layer)
        if static is not None and layer.activations is not None and layer.activations.range is RangeKind.STATIC:
            consumed.add(f"{name}.input_global_scale")
            state[static] = NVFP4_NUMERATOR / reader.load(f"{name}.input_global_scale").to(torch.float32).reshape(1)
    for name in reader.infos:
        if name not in consumed:
            state[name] = reader.load(name)
    return state


def _load_state(
    path: Path,
    reader: CheckpointReader,
    layers: Mapping[str, StoredLayer],
    state: dict[str, Tensor],
    dtype: torch.dtype,
) -> Any:
    config = cast(Any, AutoConfig).from_pretrained(path)
    config.quantization_config = MicroscaleConfig.from_layers(layers, []).to_dict()
    if f"{_head_name(layers)}" in layers:
        config.tie_word_embeddings = False
    model = _from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def _head_name(layers: Mapping[str, StoredLayer]) -> str:
    return next((name for name in layers if name.endswith("lm_head")), "lm_head")


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer that lies beside a model.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return cast(Any, AutoTokenizer).from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} has no tokenizer that can be loaded: {error}") from error
    finally:
        logger.setLevel(before)


def stored_layers_of(model: nn.Module) -> dict[str, StoredLayer]:
    """Describe the packed modules of a model."""
    layers: dict[str, StoredLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            spec = module.activations.spec if isinstance(module, QuantizedLinear) and module.activations else None
            layers[name] = StoredLayer(
                name=name,
                format=module.format,
                shape=module.shape,
                dtype=module.weight_dtype,
                activations=spec,
                method=module.method,
                kind="embedding" if isinstance(module, QuantizedEmbedding) else "linear",
            )
    return layers


def unquantized_linears(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that still have float weights."""
    return [name for name, (kind, _) in quantizable_modules(model).items() if kind == "linear"]


def mark_quantized(model: Any, version: str) -> None:
    """Put our quantization_config and the ``microscale`` object into the model's config, for save_pretrained."""
    register()
    layers = stored_layers_of(model)
    model.config.quantization_config = MicroscaleConfig.from_layers(layers, unquantized_linears(model))
    model.config.microscale = describe(list(layers.values()), "microscale", version)


def save_model(
    model: Any,
    target: str | Path,
    *,
    version: str,
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
    layers = stored_layers_of(model)
    if not layers:
        raise ModelError("the model has no quantized layers; quantize it first, or use its own save_pretrained")
    chosen = choose_layout(layout, list(layers.values()))
    quantization = chosen.config(list(layers.values()), unquantized_linears(model))
    note = describe(list(layers.values()), chosen.name, version)
    state = _packed_state(model, chosen, layers)

    def fill(directory: Path) -> None:
        _save_pretrained(model, directory, state, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        config = read_json(directory / "config.json")
        config["quantization_config"] = quantization
        config["microscale"] = note
        if not isinstance(chosen, NativeLayout):
            config["dtype"] = "bfloat16"
        write_json(directory / "config.json", config)

    write_directory(target, fill, overwrite=overwrite)
    return chosen.name


def _packed_state(model: Any, layout: FileLayout, layers: Mapping[str, StoredLayer]) -> dict[str, Tensor]:
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
        model.save_pretrained(directory, state_dict=state, max_shard_size=max_shard_size)
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
        if config_before is not None:
            model.config.quantization_config = config_before
        if bar_enabled:
            transformers_logging.enable_progress_bar()


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Return a callable from token ids [batch, tokens] to logits, as the evaluation room wants it."""

    def call(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens.to(model.device), use_cache=False).logits

    return call


def parse_dtype(word: str) -> torch.dtype:
    """Return the torch float type of a word.

    Raises:
        DtypeError: another word.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if word not in known:
        raise DtypeError(f"unknown dtype {word!r}; possible: {', '.join(known)}")
    return known[word]


def check_window(model: Any, window: int) -> None:
    """Refuse windows longer than the model's positions.

    Raises:
        ShapeError: with the longest possible window.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and window > limit:
        raise ShapeError(f"window {window} is longer than the {limit} positions of the model; lower --window")
