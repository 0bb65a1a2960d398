"""Load whole models through transformers: original checkpoints, our layout, and other tools' layouts.

Every quantized checkpoint becomes the same thing in memory: a transformers model whose linear layers are packed
modules. A checkpoint of another tool is translated tensor by tensor into the names of our layout first.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from microscale.checkpoint.compressed_tensors import INPUT_SCALE, input_range
from microscale.checkpoint.float_reader import FloatReader, open_floats
from microscale.checkpoint.gguf_file import architecture_of, read_gguf
from microscale.checkpoint.gguf_names import ARCHITECTURES
from microscale.checkpoint.native import NativeLayout, range_name
from microscale.checkpoint.reader import INDEX_NAME, CheckpointReader
from microscale.checkpoint.registry import read_stored_layers
from microscale.checkpoint.schema import FileLayout
from microscale.errors import (
    CheckpointError,
    MicroscaleError,
    ModelError,
    QuantizationNote,
    ShapeError,
    check_path,
    counted,
)
from microscale.formats import RangeKind
from microscale.formats.dtypes import FLOAT_DTYPES, checked_dtype
from microscale.integrations.adapters import base_of, is_adapter, merge_adapter
from microscale.integrations.cache_scales import (
    SCHEME,
    CacheScheme,
    is_scale,
    note_stored,
    pending_scale,
    settle_cache,
    usable_scheme,
)
from microscale.integrations.floats import is_packed, pending_state, tell_of_first_rounding, without_quantization
from microscale.integrations.gguf_floats import load_gguf_floats
from microscale.integrations.hf_quantizer import MicroscaleConfig, note_requested, register
from microscale.integrations.hub import check_local, check_not_missing
from microscale.integrations.model_class import class_at, class_of
from microscale.integrations.packed_experts import expanded, packed_stacks, tell_of_expanded
from microscale.integrations.pending import PendingTensor
from microscale.integrations.places import find_leftover, keep_all, note_leftover, settle_tying
from microscale.integrations.quiet import quiet_transformers
from microscale.integrations.remote_code import is_trusted, said_of
from microscale.integrations.unpacking import make_floats
from microscale.layer_spec import LayerSpec
from microscale.layerwise.pieces import LanguageModelInPieces
from microscale.nn.inference import prepare_for_inference
from microscale.tensor import QuantizedTensor

LIBRARY_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    AttributeError,
    ImportError,
    ArithmeticError,
    StrictDataclassError,
)
"""What transformers raises about a config, a generation config or weights that it cannot take."""


def _from_pretrained(path: str | Path | None, label: str | Path = "the model", **options: Any) -> Any:
    """Call transformers, quietly, and turn what it raises into our classes; ``label`` names a model without a path."""
    label = path or label
    try:
        with quiet_transformers():
            kind = class_of(options["config"]) if path is None else class_at(path)
            model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    except MicroscaleError:
        raise
    except LIBRARY_ERRORS as error:
        raise ModelError(said_of(error, label) or f"{label} cannot be loaded: {error}") from error
    missing = sorted(str(name) for name in info.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{label} lacks {counted(len(missing), 'tensor')} of the model, e.g. {missing[0]!r};"
            " they would be random numbers. The checkpoint is incomplete or of another architecture"
        )
    unused = sorted(str(name) for name in info.get("unexpected_keys", ()))
    if unused and not Path(label).is_dir():  # of a directory all names are compared: see keep_all
        warnings.warn(
            f"{label} holds {counted(len(unused), 'tensor')} that the model has no place for, e.g."
            f" {unused[0]!r}; they were left out",
            stacklevel=4,
        )
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0  # RWKV halves weights against hidden states, which packed weights cannot follow
    return model.eval()


def load_original(path: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Load the float weights of a language model, with or without vision, from a directory, a GGUF file or by hub name.

    Weights that are quantized already, by us or another tool, are read as the floats that they stand for, with a
    warning.

    Raises:
        CheckpointError, ModelError: missing, damaged, quantized in a way that is not read, or no model that generates
            text.
    """
    if is_adapter(path):
        return merge_adapter(load_original(base_of(path), dtype=dtype), path)
    local = None if is_gguf(path) else check_local(path)
    if is_gguf(path) or (local is not None and is_packed(local)):
        model = load_model(path, dtype=dtype)
        tell_of_first_rounding(path, make_floats(model, dtype or model.dtype))
        return model
    if local is None:
        return keep_all(_from_pretrained(path, dtype=dtype or "auto"), None)
    return _load_floats(path, local, dtype)


def _load_floats(path: str | Path, local: Path, dtype: torch.dtype | None) -> Any:
    """Load a directory of floats; what another tool has rounded is made of its parts when it is taken."""
    if not any(local.glob("*.safetensors")):
        return keep_all(_from_pretrained(path, dtype=dtype or "auto"), local)
    reader = open_floats(local)
    is_split = len(reader.files) > 1 and not (local / INDEX_NAME).exists()
    if not isinstance(reader, FloatReader) and not is_split:
        return keep_all(_from_pretrained(path, dtype=dtype or "auto"), local)
    config = read_model_config(local)
    without_quantization(config)
    state = pending_state(reader)
    if isinstance(reader, FloatReader):
        for sentence in reader.told:
            warnings.warn(sentence, QuantizationNote, stacklevel=4)
    model = _from_pretrained(None, label=local, config=config, state_dict=state, dtype=dtype or reader.dtype)
    model.config.name_or_path = model.name_or_path = str(local)
    read_generation_config(model, local)
    return keep_all(model, local, note_stored(model, reader))


def build_model(path: Path, config: Any, state: Mapping[str, Any]) -> Any:
    """Return the model of a config with the tensors of a state dict, as :func:`load_original` would load them.

    Raises:
        ModelError: transformers cannot build it, or a tensor is missing.
    """
    return _from_pretrained(None, label=path, config=config, state_dict=dict(state), dtype="auto")


def load_model(path: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Load a model, quantized or not, from a directory, a GGUF file or by hub name; packed weights stay packed.

    A quantized model comes frozen and ready for the fastest kernels
    (:func:`microscale.nn.inference.prepare_for_inference`).
    ``dtype`` is the float type of all that is not packed and of the computation (default: the checkpoint's).
    Stacked experts of other tools' files are taken apart and stay packed.

    Raises:
        CheckpointError, ModelError: missing, damaged, or of a layout that we do not read.
    """
    check_path(path, "the path of a model", "a directory, a file or a hub name")
    register()
    dtype = checked_dtype(dtype)
    if is_gguf(path):
        return _load_gguf(Path(path), dtype)
    if is_adapter(path):
        return load_original(path, dtype=dtype)
    local = check_local(path)
    if local is None:
        return _from_pretrained(path, dtype=dtype or "auto")
    if not is_packed(local):
        return settle_cache(_load_floats(path, local, dtype), None)
    reader = CheckpointReader(local)
    layout, layers = read_stored_layers(reader.config, reader.infos, reader.dtype)
    source = _file_source(reader, layout, layers)
    own = source.config.quantization_config if isinstance(layout, NativeLayout) else None
    model = _load_packed(source, dtype or reader.dtype, own)
    note_requested(model, layout)
    note = getattr(model.config, "microscale", None)
    if isinstance(note, dict):  # save_pretrained will write our layout
        model.config.microscale = {**cast("dict[str, Any]", note), "layout": NativeLayout.name}
    read_generation_config(model, local)
    return model


def read_generation_config(model: Any, local: Path) -> None:
    """Give a model the generation config of its directory, where there is one.

    Raises:
        ModelError: transformers cannot read it.
    """
    if (local / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(local)
        except LIBRARY_ERRORS as error:
            raise ModelError(f"{local / 'generation_config.json'} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A quantized checkpoint: where it is, its quantized layers, its other tensors, and the model's config."""

    path: Path
    config: Any
    layers: dict[str, LayerSpec]
    load_layer: Callable[[LayerSpec], QuantizedTensor]
    others: dict[str, PendingTensor]
    reader: CheckpointReader | None = None
    cache_scheme: CacheScheme | None = None


def _file_source(reader: CheckpointReader, layout: FileLayout, layers: dict[str, LayerSpec]) -> _Source:
    consumed = {name for layer in layers.values() for name in layout.tensor_names(layer)}
    others: dict[str, PendingTensor] = {}
    for name, layer in layers.items():
        static = range_name(layer)
        is_static = layer.activations is not None and layer.activations.range is RangeKind.STATIC
        if static is not None and is_static and not isinstance(layout, NativeLayout):
            consumed.add(f"{name}.{INPUT_SCALE}")
            load = functools.partial(_static_range, reader, f"{name}.{INPUT_SCALE}")
            others[static] = PendingTensor(dtype=torch.float32, load=load)
    for name, info in reader.infos.items():
        if name not in consumed and is_scale(name):
            others[name] = pending_scale(reader, name)
        elif name not in consumed:
            others[name] = PendingTensor(dtype=info.dtype, load=functools.partial(reader.load, name))
    return _Source(
        path=reader.path,
        config=read_model_config(reader.path),
        layers=layers,
        load_layer=lambda layer: layout.unpack(layer, reader.load),
        others=others,
        reader=reader,
        cache_scheme=usable_scheme((reader.quantization_config or {}).get(SCHEME), reader),
    )


def read_model_config(path: str | Path) -> Any:
    """Return the config of a model in a directory or a GGUF file, or by hub name.

    Raises:
        ModelError: transformers cannot read it.
    """
    try:
        if is_gguf(path):
            return cast(Any, AutoConfig).from_pretrained(
                Path(path).parent, gguf_file=Path(path).name, trust_remote_code=is_trusted()
            )
        return cast(Any, AutoConfig).from_pretrained(path, trust_remote_code=is_trusted())
    except LIBRARY_ERRORS as error:
        raise ModelError(said_of(error, path) or f"{path} has no config that can be read: {error}") from error


def _static_range(reader: CheckpointReader, name: str, dtype: torch.dtype | None) -> Tensor:
    scale = reader.load(name).to(torch.float32)  # whatever ``dtype`` is: a range has this one in every model
    if scale.numel() != 1 or not (bool(torch.isfinite(scale).all()) and bool((scale > 0).all())):
        raise CheckpointError(f"tensor {name!r} must be one finite and positive number, got {scale.tolist()}")
    return input_range(scale.reshape(1))


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file."""
    return str(path).endswith(".gguf")


def _load_gguf(path: Path, dtype: torch.dtype | None) -> Any:
    if architecture_of(path) not in ARCHITECTURES:
        return load_gguf_floats(path, dtype or torch.bfloat16, read_model_config(path), LIBRARY_ERRORS)
    found, config = read_gguf(path), read_model_config(path)
    if "rope_freqs.weight" in found.ignored:
        warnings.warn(
            f"{path} scales its rotary frequencies (rope_freqs.weight), which is not taken over: long contexts suffer",
            stacklevel=3,
        )
    source = _Source(
        path=path,
        config=config,
        layers=dict(found.layers),
        load_layer=lambda layer: found.load_layer(layer.name),
        others={
            name: PendingTensor(dtype=found.stored_dtype(name), load=functools.partial(found.load_tensor, name))
            for name in found.tensors
        },
    )
    return _load_packed(source, dtype or torch.bfloat16, None)


def _load_packed(source: _Source, dtype: torch.dtype, own: dict[str, Any] | None) -> Any:
    """Build the model from a state dict in the names of our layout; ``own`` is the config of a file in our layout.

    Packed parts are read into the memory where they stay; all other tensors are read when the model takes them.
    """
    native = NativeLayout()
    state: dict[str, Tensor | PendingTensor] = {}
    packed: dict[str, LayerSpec] = {}
    stacks = packed_stacks(source.config, source.layers)
    for name, layer in source.layers.items():
        if layer.tied_to is not None:
            packed[name] = layer
        elif name in stacks:
            own_layers = stacks[name].layers()
            packed.update(own_layers)
            for place, tensor in stacks[name].tensors(source.load_layer(layer)).items():
                state.update(native.pack(own_layers[place], tensor))
            bias = source.others.pop(f"{name}_bias", None)
            state.update({} if bias is None else stacks[name].biases(bias[...]))
        elif layer.kind == "experts":
            state[name] = expanded(source.config, source.load_layer(layer))
        else:
            packed[name] = layer
            state.update(native.pack(layer, source.load_layer(layer)))
    tell_of_expanded([name for name, layer in source.layers.items() if layer.kind == "experts" and name not in stacks])
    state.update(source.others)
    config = source.config
    if own is None:
        settle_tying(config, packed, state)
    if packed:
        narrow = {
            name.removesuffix(".weight"): pending.dtype
            for name, pending in source.others.items()
            if name.endswith(".weight") and pending.dtype in FLOAT_DTYPES and pending.dtype.itemsize < dtype.itemsize
        }
        described = MicroscaleConfig.from_layers(packed, []).to_dict() if own is None else own
        if own is None and source.cache_scheme is not None:
            described[SCHEME] = dict(source.cache_scheme.words)
        config.quantization_config = {**described, "narrow_tables": narrow}
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    model = _from_pretrained(None, label=source.path, config=config, state_dict=state, dtype=dtype)
    state.clear()  # else the parts that were read would stand in memory beside those that are laid out anew
    model.config.name_or_path = model.name_or_path = str(source.path)
    if source.reader is not None:
        names = source.others.keys() & source.reader.infos.keys()
        note_leftover(model, find_leftover(source.reader, names, model))
    prepare_for_inference(model)
    return model


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer that lies beside a model.

    Raises:
        CheckpointNotFoundError: no such directory.
        ModelError: there is no tokenizer, or it is damaged.
    """
    check_path(path, "the path of a model", "a directory, a file or a hub name")
    if not is_gguf(path):
        check_not_missing(path)
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if is_gguf(path):
            return cast(Any, AutoTokenizer).from_pretrained(
                Path(path).parent, gguf_file=Path(path).name, trust_remote_code=is_trusted()
            )
        return cast(Any, AutoTokenizer).from_pretrained(path, trust_remote_code=is_trusted())
    except LIBRARY_ERRORS as error:
        raise ModelError(said_of(error, path) or f"{path} has no tokenizer that can be loaded: {error}") from error
    finally:
        logger.setLevel(before)


def logits_of(model: Any) -> LanguageModelInPieces:
    """Return a model as the evaluation room wants it: from batches to logits, which come in pieces where they can."""
    return LanguageModelInPieces(model)


def stored_dtype(path: str | Path) -> torch.dtype:
    """Return the float type that a model's checkpoint stores, by its config.

    Raises:
        ModelError: no config can be read.
    """
    dtype = read_model_config(path).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def check_window(model: Any, window: int) -> None:
    """Refuse windows longer than the model's positions.

    Raises:
        ShapeError: with the longest possible window.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and window > limit:
        raise ShapeError(
            f"window {window} is longer than the {counted(limit, 'position')} of the model; lower --window"
        )
