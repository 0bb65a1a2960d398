"""GGUF files for the tests: written with gguf-py, or byte by byte. Importing this skips a test file without gguf-py."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

gguf = pytest.importorskip("gguf")
Type = gguf.GGMLQuantizationType

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, EXPERTS = 4, 2, 32, 64, 96, 3
QUERY = HEADS * HEAD_DIM
METADATA: dict[str, Any] = {
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "block_count": 1,
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": INTERMEDIATE,
    "rope.dimension_count": HEAD_DIM,
}


def write(
    path: Path, tensors: Mapping[str, tuple[np.ndarray, Any]], arch: str = "llama", metadata: dict[str, Any] = METADATA
) -> Path:
    """Write a GGUF file with gguf-py; each tensor is float32 and stored as the ggml type beside it."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{arch}.rope.freq_base", 10000.0)
    writer.add_vocab_size(64)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def rounded(values: np.ndarray, kind: Any) -> Tensor:
    """What gguf-py itself reads back after quantizing."""
    return torch.from_numpy(
        gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind).reshape(values.shape).copy()
    )


def rotary_pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Row r of the first half of a head goes beside row r of the second half, as llama.cpp's converter does."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def llama_tensors(weight: Any = Type.MXFP4, *, norm: Any = Type.F32) -> dict[str, tuple[np.ndarray, Any]]:
    """The tensors of a Llama of one block in llama.cpp's names, in the row order of transformers."""
    return {
        "token_embd.weight": (random(64, HIDDEN, seed=1), weight),
        "output_norm.weight": (1 + random(HIDDEN, seed=2) / 8, norm),
        "output.weight": (random(64, HIDDEN, seed=3), weight),
        "blk.0.attn_norm.weight": (1 + random(HIDDEN, seed=4) / 8, norm),
        "blk.0.attn_q.weight": (random(QUERY, HIDDEN, seed=5), weight),
        "blk.0.attn_k.weight": (random(KV_HEADS * HEAD_DIM, HIDDEN, seed=6), weight),
        "blk.0.attn_v.weight": (random(KV_HEADS * HEAD_DIM, HIDDEN, seed=7), weight),
        "blk.0.attn_output.weight": (random(HIDDEN, QUERY, seed=8), weight),
        "blk.0.ffn_norm.weight": (1 + random(HIDDEN, seed=9) / 8, norm),
        "blk.0.ffn_gate.weight": (random(INTERMEDIATE, HIDDEN, seed=10), weight),
        "blk.0.ffn_up.weight": (random(INTERMEDIATE, HIDDEN, seed=11), weight),
        "blk.0.ffn_down.weight": (random(HIDDEN, INTERMEDIATE, seed=12), weight),
    }


def as_llama_cpp(tensors: Mapping[str, tuple[np.ndarray, Any]]) -> dict[str, tuple[np.ndarray, Any]]:
    result = dict(tensors)
    for stem, num_heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
        for suffix in ("weight", "bias"):
            name = f"blk.0.{stem}.{suffix}"
            if name in result:
                result[name] = (rotary_pairs(result[name][0], num_heads), result[name][1])
    return result


def expert_tensors(gate: Any, up: Any, down: Any) -> dict[str, tuple[np.ndarray, Any]]:
    return {
        "blk.0.ffn_up_exps.weight": (random(EXPERTS, INTERMEDIATE, HIDDEN, seed=1), up),
        "blk.0.ffn_gate_exps.weight": (random(EXPERTS, INTERMEDIATE, HIDDEN, seed=2), gate),
        "blk.0.ffn_down_exps.weight": (random(EXPERTS, HIDDEN, INTERMEDIATE, seed=3), down),
        "blk.0.ffn_gate_inp.weight": (random(EXPERTS, HIDDEN, seed=4), Type.MXFP4),
    }


def header_of(tensor: str = "output.weight", dims: tuple[int, ...] = (32, 1), kind: int = 39, offset: int = 0) -> bytes:
    """The bytes of a file of version 3 with one tensor, up to its data."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    head += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    head += text(tensor) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head + b"\0" * (-len(head) % 32)
