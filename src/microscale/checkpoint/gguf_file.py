"""GGUF files of llama.cpp: MXFP4 weights bit for bit, all other types as floats, under their Hugging Face names.

A GGUF file holds a whole model, so this is no :class:`~microscale.checkpoint.schema.FileLayout`: :func:`read_gguf`
returns a :class:`GgufModel`, whose names, shapes and row order are those of the transformers model.

Facts (ggml ``block_mxfp4``, gguf-py 0.19): 32 elements take 17 bytes, the E8M0 scale and 16 bytes of which byte j
holds element j (low nibble) and element j + 16 (high nibble). ggml halves the scale and doubles the element table, so
a value is E2M1 * 2^(scale - 127) as in OCP MX. Scale 255 is NaN in OCP MX and here; llama.cpp reads a number there.

llama.cpp stores the rows of attn_q and attn_k of the architecture ``llama`` as pairs for its rotary embedding; whole
rows change place, so undoing it is exact on packed weights too. Experts: ffn_gate_exps and ffn_up_exps become one
``gate_up_proj`` of [experts, rows, cols], for ``gpt-oss`` with alternating rows.

Left out: writing, files split in parts, architectures beyond :data:`~microscale.checkpoint.gguf_names.ARCHITECTURES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from microscale.checkpoint.file_bytes import PIECE_BYTES, read_into, read_tensor
from microscale.checkpoint.gguf_header import GgufEntry, GgufHeader, read_header
from microscale.checkpoint.gguf_names import ARCHITECTURES, GgufTensor, place_tensors
from microscale.errors import CheckpointError, DependencyError
from microscale.formats import parse_format
from microscale.formats.dtypes import dtype_name
from microscale.layer_spec import LayerSpec
from microscale.tensor import QuantizedTensor

BLOCK_SIZE = 32
BLOCK_BYTES = 17
MXFP4_TYPE = 39
_FLOAT_TYPES: Mapping[int, torch.dtype] = MappingProxyType({0: torch.float32, 1: torch.float16, 30: torch.bfloat16})


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """A GGUF file in Hugging Face terms; nothing but its header has been read.

    ``layers`` are the MXFP4 weights by module name (experts by parameter name, as in
    :class:`~microscale.checkpoint.schema.LayerSpec`), ``tensors`` all others by full name. ``metadata`` is the
    file's own; ``ignored`` names its tensors that a transformers model computes itself (``rope_freqs.weight``).
    """

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    layers: Mapping[str, LayerSpec]
    tensors: Mapping[str, GgufTensor]
    ignored: tuple[str, ...]
    sources: Mapping[str, GgufTensor]

    def load_layer(self, name: str) -> QuantizedTensor:
        """Read an MXFP4 weight: the file's codes and scales in our order.

        Raises:
            CheckpointError: there is no such layer, or the file cannot be read.
        """
        layer = self.layers.get(name)
        if layer is None:
            raise CheckpointError(f"{self.path} has no MXFP4 layer {name!r}")
        source = self.sources[name]
        blocks = [_read_blocks(self.path, entry) for entry in source.entries]
        codes = source.arrange([part[0] for part in blocks])
        scale = source.arrange([part[1] for part in blocks])
        parts = {"codes": codes.flatten(0, -2), "scale": scale.flatten(0, -2).contiguous()}
        return QuantizedTensor(format=layer.format, shape=layer.shape, dtype=layer.dtype, parts=parts)

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the float type of a tensor in the file (float32 for what gguf-py dequantizes)."""
        return _FLOAT_TYPES.get(self.tensors[name].entries[0].type_id, torch.float32)

    def load_tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read a tensor: float32, float16 and bfloat16 as they are, other types dequantized to float32 by gguf-py.

        With ``dtype`` the first three are cast on the way.

        Raises:
            CheckpointError: there is no such tensor, or its type cannot be dequantized.
            DependencyError: its type needs gguf-py, which is absent.
        """
        source = self.tensors.get(name)
        if source is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r} beside its MXFP4 layers")
        values = source.arrange([_read_floats(self.path, entry, dtype) for entry in source.entries])
        return values.reshape(source.stored_shape).permute(source.axes).contiguous()

    def stored_type(self, name: str) -> tuple[str, int]:
        """Return the ggml types of a tensor in words and its bytes in the file."""
        entries = self.tensors[name].entries
        words = sorted({_type_word(entry) for entry in entries})
        return "+".join(words), sum(_entry_bytes(self.path, entry) for entry in entries)


def architecture_of(path: str | Path) -> str:
    """Return what a GGUF file says that its model is.

    Raises:
        CheckpointNotFoundError, CheckpointError: no such file, or not a whole GGUF file.
    """
    return str(read_header(Path(path)).metadata.get("general.architecture"))


def read_gguf(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> GgufModel:
    """Read the header of a GGUF file; ``dtype`` is the float type that MXFP4 weights dequantize to by default.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: not a whole GGUF file, or one of an architecture or with a tensor that we do not know.
        DependencyError: a tensor has a type of which only gguf-py knows the size, and it is absent.
    """
    path = Path(path)
    header = read_header(path)
    num_parts = header.metadata.get("split.count", 1)
    if num_parts != 1:
        raise CheckpointError(f"{path} is one of {num_parts} parts; join them with llama-gguf-split --merge")
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path} has the architecture {architecture!r}, microscale reads {known}")
    _check_data(path, header)
    placed, ignored = place_tensors(path, str(architecture), header)
    fmt = parse_format("mxfp4")
    layers: dict[str, LayerSpec] = {}
    tensors: dict[str, GgufTensor] = {}
    sources: dict[str, GgufTensor] = {}
    for tensor in placed:
        if tensor.kind is None or any(entry.type_id != MXFP4_TYPE for entry in tensor.entries):
            tensors[tensor.name] = tensor
            continue
        name = tensor.name.removesuffix(".weight")
        shape = tensor.stored_shape
        layers[name] = LayerSpec(
            name=name, format=fmt, shape=shape, dtype=dtype, method="unknown", kind=tensor.kind.value
        )
        sources[name] = tensor
    return GgufModel(
        path=path,
        architecture=str(architecture),
        metadata=header.metadata,
        layers=layers,
        tensors=tensors,
        ignored=ignored,
        sources=sources,
    )


def _check_data(path: Path, header: GgufHeader) -> None:
    """Refuse tensors that reach past the end of the file or into each other, and rows of broken blocks."""
    end, previous = 0, ""
    for entry in sorted(header.entries.values(), key=lambda entry: entry.offset):
        size, _ = _type_size(path, entry)
        if entry.shape[-1] % size:
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} has rows of {entry.shape[-1]}, not a multiple of its block size {size}"
            )
        if entry.offset < end:
            raise CheckpointError(f"{path}: tensors {previous!r} and {entry.name!r} overlap; the file is damaged")
        end, previous = entry.offset + _entry_bytes(path, entry), entry.name
    if end > header.num_bytes:
        raise CheckpointError(
            f"{path} is truncated: its tensors need {end} bytes, the file has {header.num_bytes}; download it again"
        )


def _type_size(path: Path, entry: GgufEntry) -> tuple[int, int]:
    """Return how many elements a block of the entry's type has, and how many bytes."""
    if entry.type_id in _FLOAT_TYPES:
        return 1, _FLOAT_TYPES[entry.type_id].itemsize
    if entry.type_id == MXFP4_TYPE:
        return BLOCK_SIZE, BLOCK_BYTES
    gguf = _library(entry)
    try:
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(entry.type_id)]
    except (ValueError, KeyError):
        raise CheckpointError(f"{path}: tensor {entry.name!r} has the unknown ggml type {entry.type_id}") from None


def _entry_bytes(path: Path, entry: GgufEntry) -> int:
    size, num_bytes = _type_size(path, entry)
    return math.prod(entry.shape) // size * num_bytes


def _type_word(entry: GgufEntry) -> str:
    if entry.type_id in _FLOAT_TYPES:
        return dtype_name(_FLOAT_TYPES[entry.type_id])
    return "mxfp4" if entry.type_id == MXFP4_TYPE else str(_library(entry).GGMLQuantizationType(entry.type_id).name)


def _library(entry: GgufEntry) -> Any:
    try:
        import gguf
    except ImportError:
        purpose = f"reading tensor {entry.name!r} of ggml type {entry.type_id}"
        raise DependencyError("gguf", "compat", purpose) from None
    return gguf


def _read(path: Path, entry: GgufEntry, dtype: torch.dtype, shape: tuple[int, ...], as_dtype: Any = None) -> Tensor:
    try:
        return read_tensor(path, entry.offset, dtype, shape, as_dtype=as_dtype)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{path}: tensor {entry.name!r} cannot be read: {error}") from None


def _read_blocks(path: Path, entry: GgufEntry) -> tuple[Tensor, Tensor]:
    """Return the row_major codes [..., cols / 2] and the scales [..., column blocks] of an MXFP4 tensor."""
    num_blocks = math.prod(entry.shape) // BLOCK_SIZE
    codes = torch.empty(num_blocks, BLOCK_SIZE // 2, dtype=torch.uint8)
    scale = torch.empty(num_blocks, dtype=torch.uint8)
    buffer = torch.empty(min(num_blocks, PIECE_BYTES // BLOCK_BYTES), BLOCK_BYTES, dtype=torch.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            for start in range(0, num_blocks, max(1, buffer.shape[0])):
                piece = buffer[: num_blocks - start]
                read_into(file, piece)
                scale[start : start + piece.shape[0]] = piece[:, 0]
                _write_row_major(codes[start : start + piece.shape[0]], piece[:, 1:])
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{path}: tensor {entry.name!r} cannot be read: {error}") from None
    grid = (*entry.shape[:-1], entry.shape[-1] // BLOCK_SIZE)
    return codes.reshape(*entry.shape[:-1], entry.shape[-1] // 2), scale.reshape(grid)


def _write_row_major(codes: Tensor, packed: Tensor) -> None:
    """Turn [blocks, 16] with elements j and j + 16 in byte j into the same with 2i and 2i + 1 in byte i."""
    pairs = packed.clone(memory_format=torch.contiguous_format).view(torch.int16)
    codes[:, : BLOCK_SIZE // 4] = (pairs & 0x0F) | (pairs >> 4 & 0xF0)
    codes[:, BLOCK_SIZE // 4 :] = (pairs >> 4 & 0x0F) | (pairs >> 8 & 0xF0)


def _read_floats(path: Path, entry: GgufEntry, dtype: torch.dtype | None) -> Tensor:
    if entry.type_id in _FLOAT_TYPES:
        return _read(path, entry, _FLOAT_TYPES[entry.type_id], entry.shape, dtype)
    raw = _read(path, entry, torch.uint8, (_entry_bytes(path, entry),))
    gguf = _library(entry)
    rows = math.prod(entry.shape[:-1])
    try:
        values = gguf.quants.dequantize(raw.numpy().reshape(rows, -1), gguf.GGMLQuantizationType(entry.type_id))
    except NotImplementedError as error:
        raise CheckpointError(f"{path}: gguf-py cannot dequantize tensor {entry.name!r}: {error}") from None
    return torch.from_numpy(values).reshape(entry.shape)
