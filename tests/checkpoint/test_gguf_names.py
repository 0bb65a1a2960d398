"""Names of GGUF tensors in transformers models, and the order of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
    rotary_pairs,
    rounded,
    write,
)
from microscale.checkpoint.gguf_file import GgufModel, read_gguf
from microscale.checkpoint.gguf_header import GgufEntry, GgufHeader
from microscale.checkpoint.gguf_names import GgufTensor, RowOrder, WeightKind, place_tensors
from microscale.errors import CheckpointError
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


def gguf_tensor(order: RowOrder, shape: tuple[int, ...], num_heads: int | None = None) -> GgufTensor:
    return GgufTensor(
        name="x", entries=(), kind=None, stored_shape=shape, axes=(0, 1), order=order, num_heads=num_heads
    )


@given(st.integers(1, 5), st.integers(1, 6))
def test_rotary_pairs_are_undone(heads: int, half: int) -> None:
    """Each head's rows stand as 0, half, 1, half + 1 … in the file."""
    rows = np.arange(heads * half * 2, dtype=np.float32)[:, None]
    tensor = gguf_tensor(RowOrder.ROTARY_PAIRS, rows.shape, heads)
    stored = torch.from_numpy(rotary_pairs(rows, heads))
    assert torch.equal(tensor.arrange([stored]), torch.from_numpy(rows))


def test_experts_are_joined() -> None:
    gate, up = torch.tensor([[[1], [2]], [[3], [4]]]), torch.tensor([[[5], [6]], [[7], [8]]])
    joined = gguf_tensor(RowOrder.CONCATENATED, (2, 4, 1)).arrange([gate, up])
    assert joined.flatten().tolist() == [1, 2, 5, 6, 3, 4, 7, 8]
    in_turn = gguf_tensor(RowOrder.ALTERNATING, (2, 4, 1)).arrange([gate, up])
    assert in_turn.flatten().tolist() == [1, 5, 2, 6, 3, 7, 4, 8]


def placed(architecture: str, *tensors: tuple[str, tuple[int, ...]], **metadata: Any) -> Any:
    entries = {name: GgufEntry(name=name, type_id=0, shape=shape, offset=0) for name, shape in tensors}
    header = GgufHeader(metadata=metadata, entries=entries, num_bytes=0)
    return place_tensors(Path("m.gguf"), architecture, header)


@pytest.mark.parametrize(
    ("architecture", "name", "shape", "target", "kind"),
    [
        ("qwen2", "blk.007.ffn_up.weight", (4, 2), "model.layers.7.mlp.up_proj.weight", WeightKind.LINEAR),
        ("qwen2", "blk.0.attn_q.bias", (4,), "model.layers.0.self_attn.q_proj.bias", None),
        ("qwen3moe", "blk.0.ffn_gate_inp.weight", (4, 2), "model.layers.0.mlp.gate.weight", None),
        ("gpt-oss", "blk.0.ffn_gate_inp.weight", (4, 2), "model.layers.0.mlp.router.weight", None),
        ("gpt-oss", "blk.0.attn_sinks.weight", (4,), "model.layers.0.self_attn.sinks", None),
        ("gpt-oss", "blk.0.ffn_down_exps.bias", (3, 4), "model.layers.0.mlp.experts.down_proj_bias", None),
        ("llama", "token_embd.weight", (4, 2), "model.embed_tokens.weight", WeightKind.EMBEDDING),
    ],
)
def test_places(architecture: str, name: str, shape: tuple[int, ...], target: str, kind: WeightKind | None) -> None:
    ((tensor,), ignored) = placed(architecture, (name, shape), **{"general.architecture": architecture})
    assert (tensor.name, tensor.kind, tensor.shape, ignored) == (target, kind, shape, ())


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ([("blk.0.attn_q.weight", (6, 2))], {"llama.attention.head_count": 2}, "6 rows, which 2 heads cannot share"),
        ([("blk.0.attn_q.weight", (4, 2))], {"llama.attention.head_count": "4"}, "must be a positive number, got '4'"),
        ([("blk.1.attn_q.weight", (4, 2))], {"llama.attention.head_count": [2]}, "must be a positive number, got None"),
        ([("output.weight", (4,))], {}, r"must have 2 dimensions, got the shape \[4\]"),
        ([("blk.0.ffn_up.weight", (4, 2)), ("blk.00.ffn_up.weight", (4, 2))], {}, "two tensors stand for the same"),
        (
            [("blk.0.ffn_gate_exps.weight", (3, 4, 2))],
            {},
            r"a pair of one shape, got \[\[3, 4, 2\], None\]",
        ),
        ([("blk.0.output.weight", (4, 2))], {}, "has no place in a model of architecture llama"),
    ],
)
def test_tensors_without_a_place(tensors: list[Any], metadata: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        placed("llama", *tensors, **metadata)
