"""Names of GGUF tensors in transformers models, and the order of their rows."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gguf_files import (
    HEADS,
    HIDDEN,
    KV_HEADS,
    METADATA,
    Type,
    as_llama_cpp,
    llama_tensors,
    random,
    rounded,
    write,
)
from microscale.checkpoint.gguf_file import GgufModel, read_gguf
from microscale.kernels import dequantize


def values_of(model: GgufModel, name: str) -> Tensor:
    return dequantize(model.load_layer(name), torch.float32)


def test_head_counts_by_block(tmp_path: Path) -> None:
    metadata = METADATA | {"attention.head_count_kv": [KV_HEADS], "attention.head_count": [HEADS]}
    model = read_gguf(write(tmp_path / "a.gguf", as_llama_cpp(llama_tensors()), metadata=metadata))
    k_proj = llama_tensors()["blk.0.attn_k.weight"][0]
    assert torch.equal(values_of(model, "model.layers.0.self_attn.k_proj"), rounded(k_proj, Type.MXFP4))


def test_shared_expert_gate_is_a_matrix(tmp_path: Path) -> None:
    tensors = {"blk.0.ffn_gate_inp_shexp.weight": (random(HIDDEN), Type.F32)}
    model = read_gguf(write(tmp_path / "model.gguf", tensors, "qwen2moe"))
    assert model.load_tensor("model.layers.0.mlp.shared_expert_gate.weight").shape == (1, HIDDEN)
