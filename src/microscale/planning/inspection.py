"""Inspect a checkpoint without loading it: formats layer by layer, sizes, rules, bits per weight."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from microscale.checkpoint.gguf_file import GgufModel, read_gguf
from microscale.checkpoint.native import NativeLayout, online_infos
from microscale.checkpoint.reader import CheckpointReader
from microscale.checkpoint.registry import read_stored_layers
from microscale.checkpoint.schema import TensorInfo
from microscale.errors import counted
from microscale.formats import format_name
from microscale.formats.dtypes import dtype_name, named_dtype
from microscale.layer_spec import LayerSpec
from microscale.nn.attention_setting import NOT_ROUNDED, AttentionFormats, read_attention
from microscale.nn.sizes import Size, size_text, spec_bytes, total_size

GGUF_FLOAT = torch.bfloat16
"""What the weights of a GGUF file count as before they were quantized: it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """One tensor or quantized layer: where it stands, what it is, what it takes.

    ``online``: the transforms and the side path that the layer computes at run time, in words. ``tied_to``: the layer
    whose weight this one uses; weights and bytes count there. ``float_bytes``: what the weight takes unquantized.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    activations: str | None = None
    method: str | None = None
    num_weights: int
    num_bytes: int
    float_bytes: int
    online: str = ""
    tied_to: str | None = None

    @property
    def size(self) -> Size:
        """Weights and bytes."""
        return Size(num_weights=self.num_weights, num_bytes=self.num_bytes)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight."""
        return self.size.bits_per_weight

    def as_json(self) -> dict[str, Any]:
        """Return all fields, and the bits for each weight."""
        return {**dataclasses.asdict(self), "bits_per_weight": self.bits_per_weight}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """All tensors of a checkpoint, the quantized layers first; ``file_bytes`` are its files of weights on disk."""

    path: str
    layout: str
    num_files: int
    file_bytes: int
    quantized: tuple[LayerFacts, ...]
    others: tuple[LayerFacts, ...]
    attention: AttentionFormats = NOT_ROUNDED

    @property
    def size(self) -> Size:
        """The whole model."""
        return self.quantized_size + total_size(layer.size for layer in self.others)

    @property
    def quantized_size(self) -> Size:
        """The quantized layers."""
        return total_size(layer.size for layer in self.quantized)

    @property
    def float_size(self) -> Size:
        """The whole model before it was quantized."""
        layers = (*self.quantized, *self.others)
        return Size(num_weights=self.num_weights, num_bytes=sum(layer.float_bytes for layer in layers))

    def size_words(self, before: Size | None = None) -> str:
        """Say how large the whole model was and is, and its files; ``before`` is what is known of the original."""
        before = before or self.float_size
        after = Size(num_weights=before.num_weights, num_bytes=self.num_bytes)
        sizes = [f"{size_text(one.num_bytes)} ({one.bits_per_weight:.3f} bits per weight)" for one in (before, after)]
        whole = " before, ".join(sizes) if before != after else sizes[0]
        files = f"{self.file_bytes:,} bytes in {counted(self.num_files, 'file')}"
        return f"whole model of {counted(before.num_weights, 'weight')}: {whole}{' now' * (before != after)}; {files}"

    @property
    def num_weights(self) -> int:
        """Numbers in the whole model."""
        return self.size.num_weights

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole model."""
        return self.size.num_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight over the whole model."""
        return self.size.bits_per_weight

    @property
    def bits_per_quantized_weight(self) -> float:
        """Stored bits for each weight over the quantized layers (0 without any)."""
        return self.quantized_size.bits_per_weight

    def as_json(self) -> dict[str, Any]:
        """Return sizes, the rounding of attention, and every layer and tensor."""
        return {
            "path": self.path,
            "layout": self.layout,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_quantized_weight": self.bits_per_quantized_weight,
            "weights": self.num_weights,
            "bytes": self.num_bytes,
            "files": self.num_files,
            "file_bytes": self.file_bytes,
            "bytes_before": self.float_size.num_bytes,
            "bits_per_weight_before": self.float_size.bits_per_weight,
            **self.attention.option_words,
            "layers": self.quantized,
            "others": self.others,
        }


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Read config and tensor headers of a checkpoint directory, or the header of a GGUF file.

    Raises:
        CheckpointError: missing, damaged or of a layout that is not read.
    """
    if str(path).endswith(".gguf"):
        return _inspect_gguf(Path(path))
    reader = CheckpointReader(path)
    consumed: set[str] = set()
    quantized: list[LayerFacts] = []
    layout_name = "none"
    attention: AttentionFormats | None = None
    if reader.quantization_config is not None:
        layout, layers = read_stored_layers(reader.config, reader.infos, reader.dtype)
        layout_name = layout.name
        if isinstance(layout, NativeLayout):
            attention = read_attention(reader.quantization_config.get("attention"))
        for layer in layers.values():
            names = [*layout.tensor_names(layer), *online_infos(layer)]  # what stays for run time is part of the cost
            consumed.update(names)
            quantized.append(_quantized_facts(layer, sum(reader.infos[part].num_bytes for part in names)))
    others = tuple(_plain_facts(name, info) for name, info in reader.infos.items() if name not in consumed)
    return Inspection(
        path=str(path),
        layout=layout_name,
        num_files=len(reader.files),
        file_bytes=sum(file.stat().st_size for file in reader.files),
        quantized=tuple(quantized),
        others=others,
        attention=attention or NOT_ROUNDED,
    )


def _inspect_gguf(path: Path) -> Inspection:
    found = read_gguf(path)
    quantized = tuple(_quantized_facts(layer, spec_bytes(layer.format, layer.shape)) for layer in found.layers.values())
    others = tuple(_gguf_facts(found, name) for name in found.tensors)
    return Inspection(
        path=str(path),
        layout="gguf",
        num_files=1,
        file_bytes=path.stat().st_size,
        quantized=quantized,
        others=others,
    )


def _gguf_facts(found: GgufModel, name: str) -> LayerFacts:
    word, num_bytes = found.stored_type(name)
    shape = found.tensors[name].shape
    num_weights = math.prod(shape)
    return LayerFacts(
        name=name,
        shape=shape,
        format=word,
        num_weights=num_weights,
        num_bytes=num_bytes,
        float_bytes=num_bytes if named_dtype(word) is not None else num_weights * GGUF_FLOAT.itemsize,
    )


def _quantized_facts(layer: LayerSpec, num_bytes: int) -> LayerFacts:
    return LayerFacts(
        name=layer.name,
        shape=layer.shape,
        format=format_name(layer.format),
        activations=None if layer.activations is None else str(layer.activations),
        method=layer.method,
        num_weights=math.prod(layer.shape) if layer.tied_to is None else 0,
        num_bytes=num_bytes,
        float_bytes=math.prod(layer.shape) * layer.dtype.itemsize if layer.tied_to is None else 0,
        online=_online_words(layer),
        tied_to=layer.tied_to,
    )


def _online_words(layer: LayerSpec) -> str:
    words = [str(spec) for spec in layer.transforms]
    return ", ".join([*words, *([f"low rank {layer.low_rank}"] if layer.low_rank else [])])


def _plain_facts(name: str, info: TensorInfo) -> LayerFacts:
    word, num_weights = dtype_name(info.dtype), math.prod(info.shape)
    return LayerFacts(
        name=name,
        shape=info.shape,
        format=word,
        num_weights=num_weights,
        num_bytes=info.num_bytes,
        float_bytes=info.num_bytes,
    )
