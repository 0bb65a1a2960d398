"""Our ``quant_method`` for transformers: the configuration class and the quantizer that builds packed modules.

:func:`register` makes ``AutoModelForCausalLM.from_pretrained`` load our layout and ``save_pretrained`` write the
same bytes back. Without it transformers only warns about the unknown method and leaves the weights random, so
``import microscale.hf`` must come first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from microscale.checkpoint.compressed_tensors import ACTIVATION_EQUIVALENTS, CompressedTensorsLayout
from microscale.checkpoint.native import FORMAT_VERSION, QUANT_METHOD, NativeLayout, read_layers
from microscale.checkpoint.schema import FileLayout
from microscale.checkpoint.validation import check_parts
from microscale.errors import CheckpointError, counted
from microscale.families.modules import is_transposed
from microscale.formats import format_name
from microscale.integrations.attention import apply_attention
from microscale.integrations.cache_scales import SCHEME, is_scale, note_scheme, put_scales, read_rounding, read_scheme
from microscale.integrations.pending import PendingTensor
from microscale.layer_spec import LayerSpec
from microscale.nn.attention_setting import FileScales
from microscale.nn.embedding import NarrowEmbedding, QuantizedEmbedding
from microscale.nn.experts import unstack_experts
from microscale.nn.inference import freeze, prepare_for_inference
from microscale.nn.linear import QuantizedLinear
from microscale.nn.modules import replace_module, untie
from microscale.nn.packed import PackedModule, Precision

ONLINE_PART = re.compile(r"\.(transforms\.\d+_(scale|order|matrix|left|right)|low_rank\.(down|up))$")
"""The tensors of what a layer does online."""


class MicroscaleConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of our layout for transformers; docs/reference/checkpoint.md has the fields."""

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        schemes: list[dict[str, Any]] | None = None,
        layers: dict[str, Any] | None = None,
        unquantized: list[str] | None = None,
        narrow_tables: Mapping[str, torch.dtype] | None = None,
        **others: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.format_version = format_version
        self.schemes = schemes or []
        self.layers = layers or {}
        self.unquantized = unquantized or []
        # Embeddings that keep a narrower dtype than the model's: said by our loader alone, never read from a file.
        self.is_from_loader = isinstance(narrow_tables, Mapping)
        tables = narrow_tables if isinstance(narrow_tables, Mapping) else {}
        self.narrow_tables = {name: dtype for name, dtype in tables.items() if isinstance(dtype, torch.dtype)}
        self.others = {key: value for key, value in others.items() if key not in ("quant_method", "others")}

    def set_entry(self, key: str, value: Any) -> None:
        """Set an entry beside those for layers; None takes it out."""
        self.others = {name: kept for name, kept in self.others.items() if name != key}
        if value is not None:
            self.others[key] = value

    @classmethod
    def from_layers(cls, layers: Mapping[str, LayerSpec], unquantized: list[str]) -> MicroscaleConfig:
        """Build the configuration that describes quantized layers."""
        return cls(**NativeLayout().config(list(layers.values()), unquantized))

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "schemes": self.schemes,
            "layers": self.layers,
            "unquantized": self.unquantized,
            **self.others,
        }


class MicroscaleQuantizer(HfQuantizer):
    """Builds packed modules before the weights are read; checks and prepares them afterwards."""

    requires_calibration = True

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Allow save_pretrained."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Packed weights have no gradient."""
        return False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Need nothing but torch."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.put_modules(model)

    def put_modules(self, model: Any) -> None:
        """Put packed modules without content where the checkpoint has them; the model may lie on ``meta``."""
        config = cast(MicroscaleConfig, self.quantization_config)
        layers = read_layers(config.to_dict())
        listed = [*layers, *config.unquantized]
        unstack_experts(model, lambda name: _has_layers_in(name, listed, model.base_model_prefix))
        present = _present_layers(model, layers)
        for name, layer in present.items():
            module = empty_module(model.get_submodule(name), layer, cast(torch.dtype, model.config.dtype))
            replace_module(model, name, module)
        places = {layer.name: model.get_submodule(name) for name, layer in present.items()}
        tied = {name for name, layer in present.items() if layer.tied_to is not None}
        for name in tied:
            places[present[name].name].share(places[cast(str, present[name].tied_to)])
        untie(model, set(present), tied)
        for name, stored in config.narrow_tables.items():
            keep_narrow(model, name, stored)
        rounding = read_rounding(config.others)
        if rounding is not None and isinstance(rounding.kv_cache, FileScales):
            put_scales(model, read_scheme(config.others[SCHEME]))

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> Any:
        """Never cast a packed part or a range: their dtypes belong to the format."""
        patterns: Any = getattr(converter, "source_patterns", None)
        name = str(patterns[0]) if patterns else ""
        leaf = name.rpartition(".")[2]
        is_range = name.endswith(".activations.amax") or is_scale(name)
        if leaf.startswith("weight_") or is_range or ONLINE_PART.search(name):
            return None
        wanted = cast(Any, super()).get_new_dtype(converter, param, dtype)
        if isinstance(param, PendingTensor):
            param.wanted = wanted
        return wanted

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, PackedModule):
                check_loaded(name, module)
        config = cast(MicroscaleConfig, self.quantization_config)
        apply_attention(model, read_rounding(config.others))
        note_scheme(model, config.others.get(SCHEME))
        freeze(model)
        if not config.is_from_loader:  # our loader still holds the parts as they were read, and does it afterwards
            prepare_for_inference(model)
        return model


def _has_layers_in(module: str, listed: Sequence[str], prefix: str) -> bool:
    """Whether a checkpoint lists layers inside a module of this model, which may be the bare base model."""
    return any(name.startswith((f"{module}.", f"{prefix}.{module}.")) for name in listed)


def _present_layers(model: Any, layers: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
    """Return the layers by their name in this model, which may be the bare base model of the checkpoint.

    Raises:
        CheckpointError: a layer that the model does not have.
    """
    names = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    present: dict[str, LayerSpec] = {}
    for name, layer in layers.items():
        short = name.removeprefix(prefix)
        if name in names:
            present[name] = layer
        elif short in names:
            present[short] = layer
        elif name.startswith(prefix):
            raise CheckpointError(
                f"quantization_config names the layer {name!r}, which {type(model).__name__} does not have;"
                " config.json belongs to another model"
            )
    if layers and not present:
        raise CheckpointError(
            f"quantization_config names {counted(len(layers), 'layer')} such as {next(iter(layers))!r}, none of which"
            f" {type(model).__name__} has; config.json belongs to another model"
        )
    return present


def empty_module(old: nn.Module, layer: LayerSpec, dtype: torch.dtype) -> PackedModule:
    """Return a packed module without content in the place of a linear layer or an embedding.

    Raises:
        CheckpointError: the module is of another kind or shape than the checkpoint says.
    """
    device = next((p.device for p in old.parameters(recurse=False)), None)
    module: PackedModule
    weight: Any = getattr(old, "weight", None)
    shape = tuple(reversed(weight.shape)) if is_transposed(old) else tuple(getattr(weight, "shape", ()))
    if shape != layer.shape:
        raise CheckpointError(
            f"layer {layer.name!r} is {list(layer.shape)} in quantization_config, but {list(shape)} in the model"
        )
    if isinstance(old, nn.Embedding):
        module = QuantizedEmbedding(dataclasses.replace(layer, kind="embedding"), original=old, device=device)
        module.output_dtype = dtype
    elif isinstance(old, nn.Linear) or is_transposed(old):
        kind = "conv1d" if is_transposed(old) else "linear"
        has_bias = getattr(old, "bias", None) is not None
        module = QuantizedLinear(dataclasses.replace(layer, kind=kind, has_bias=has_bias), device=device)
    else:
        raise CheckpointError(f"layer {layer.name!r} is a {type(old).__name__}, which cannot be quantized")
    for part in module.modules():
        # The constant of an embedding that scales its rows is in no file: transformers sets it.
        part.__dict__["_is_hf_initialized"] = not isinstance(part, nn.Embedding)
    return module


def keep_narrow(model: Any, name: str, stored: torch.dtype) -> None:
    """Replace a plain embedding that is tied to nothing by one that keeps the dtype of the file."""
    old = dict(model.named_modules()).get(name)
    if type(old) is not nn.Embedding or model.config.get_text_config().tie_word_embeddings:
        return
    module = NarrowEmbedding(
        old.num_embeddings,
        old.embedding_dim,
        dtype=stored,
        output_dtype=cast(torch.dtype, model.config.dtype),
        device=old.weight.device,
    )
    module.__dict__["_is_hf_initialized"] = True
    replace_module(model, name, module)


def check_loaded(name: str, module: PackedModule) -> None:
    """Refuse a module whose tensors were missing in the file or hold impossible values.

    Raises:
        CheckpointError: naming the layer.
    """
    if module.is_tied and module.holder.tensor.device.type == "meta":
        return
    buffers = dict(module.named_buffers(recurse=False))
    for child_name, child in module.named_children():
        if isinstance(child, nn.Embedding):
            continue
        buffers.update({f"{child_name}.{key}": value for key, value in child.named_buffers()})
    for key, value in buffers.items():
        if value.is_meta:
            return
        if not getattr(value, "_is_hf_initialized", False):
            raise CheckpointError(f"tensor '{name}.{key}' is missing in the checkpoint; it is incomplete")
    if not module.is_tied:
        check_parts(name, module.format, module.shape, module.tensor.parts)
    if isinstance(module, QuantizedLinear):
        check_online(name, module)


def check_online(name: str, module: QuantizedLinear) -> None:
    """Refuse online parts that cannot have come from a method: an order that is none, numbers that are not finite.

    Raises:
        CheckpointError: naming the tensor.
    """
    for child_name, child in (("transforms", module.transforms), ("low_rank", module.low_rank)):
        for key, value in dict(child.named_buffers() if child is not None else ()).items():
            columns = torch.arange(value.shape[-1], device=value.device, dtype=value.dtype)
            is_order = key.endswith("_order")
            if not (torch.equal(value.sort().values, columns) if is_order else bool(torch.isfinite(value).all())):
                wanted = "must name every column once" if is_order else "must be finite"
                raise CheckpointError(f"tensor '{name}.{child_name}.{key}' {wanted}; the checkpoint is damaged")


def note_requested(model: nn.Module, layout: FileLayout) -> None:
    """Note what a file calls the formats of its layers, where its layout executes inputs by a rule of its own."""
    if layout.name != CompressedTensorsLayout.name:
        return
    words = {runs: asked for asked, runs in ACTIVATION_EQUIVALENTS.items()}
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.activations is not None:
            spec = module.activations.spec
            module.requested = Precision(weights=format_name(module.format), activations=words.get(spec, str(spec)))


def register() -> None:
    """Make transformers know our quant_method; calling it again does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(MicroscaleConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(MicroscaleQuantizer)
