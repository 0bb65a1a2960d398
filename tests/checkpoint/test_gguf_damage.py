"""Damaged, hostile and unknown GGUF files: every one ends in an error that says what is wrong, and soon."""

from __future__ import annotations

import random as random_numbers
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_files import METADATA, Type, as_llama_cpp, expert_tensors, gguf, header_of, llama_tensors, random, write
from microscale.checkpoint.gguf_file import read_gguf
from microscale.errors import CheckpointError, CheckpointNotFoundError


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", as_llama_cpp(llama_tensors()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GG", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "is not a GGUF file: it starts with b'PK"),
        (b"GGUF", "4 more bytes are announced"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), r"GGUF version 1, microscale reads \(2, 3\)"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "damaged or truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "damaged or truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "has the architecture None, microscale reads llama"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + b"key", "more bytes are announced"),
        (b"GGUF" + struct.pack("<IQQQ2sI", 3, 0, 1, 2, b"\xff\xfe", 4), "not UTF-8"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "unknown type 77"),
        # An array that claims 2^60 bytes, and one of arrays: the reader of gguf-py stays busy for ever, or recurses.
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 1 << 60), "more bytes are announced"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "array of the unknown type 9"),
        (b"GGUF" + struct.pack("<IQQ" + "Q1sIB" * 2, 3, 0, 2, *[1, b"k", 0, 1] * 2), "'k' stands twice"),
        (header_of(), "is truncated: its tensors need"),
        (header_of() + bytes(16), "is truncated: its tensors need"),
        (header_of(dims=(32, 1 << 40)) + bytes(64), "is truncated"),
        (header_of(dims=(1 << 62, 1 << 62)) + bytes(64), "is truncated"),
        (header_of(offset=1 << 50) + bytes(64), "is truncated"),
        (header_of(offset=8) + bytes(64), "offset 8, not a multiple of 32"),
        (header_of(dims=(48, 1)) + bytes(64), "rows of 48, not a multiple of its block size 32"),
        (header_of(dims=(32, 0)) + bytes(64), "no elements"),
        (header_of(dims=()) + bytes(64), "has 0 dimensions"),
        (header_of(dims=(32, 1, 1, 1, 1)) + bytes(64), "has 5 dimensions"),
        (header_of(dims=(32,)) + bytes(64), r"'output.weight' must have 2 dimensions, got the shape \[32\]"),
        (header_of(kind=4242) + bytes(64), "unknown ggml type 4242"),
        (header_of("blk.0.mystery.weight") + bytes(64), "'blk.0.mystery.weight' has no place in a model of"),
        (header_of("blk.0.ffn_gate.0.weight") + bytes(64), "has no place"),
        (header_of("output.scale") + bytes(64), "has no place"),
        (header_of("ffn_up_exps.weight") + bytes(64), "has no place"),
        (header_of("blk.0.ffn_up_exps.weight", dims=(32, 1, 1)) + bytes(64), "must come as a pair"),
        (header_of("blk.0.ffn_gate_exps.weight", dims=(32, 1, 1)) + bytes(64), "must come as a pair"),
        (
            header_of("blk.0.attn_q.weight") + bytes(64),
            r"llama.attention.head_count must be a positive number, got None",
        ),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


def test_every_truncation_is_noticed(llama_file: Path, tmp_path: Path) -> None:
    whole = llama_file.read_bytes()
    end = max(int(tensor.data_offset + tensor.n_bytes) for tensor in gguf.GGUFReader(llama_file).tensors)
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 1500, 7), *range(1500, end, 997), end - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_gguf(path)
    path.write_bytes(whole[:end])
    assert len(read_gguf(path).layers) == 9


Change = Callable[[dict[str, tuple[np.ndarray, Any]], dict[str, Any]], object]


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("bert", lambda tensors, metadata: None, "architecture 'bert', microscale reads llama"),
        ("llama", lambda tensors, metadata: metadata.update({"attention.head_count": 5}), "5 heads cannot share"),
        ("llama", lambda tensors, metadata: metadata.update({"attention.head_count": []}), "must be a positive number"),
        (
            "gpt-oss",
            lambda tensors, metadata: tensors.update({"blk.0.post_attention_norm.weight": (random(64), Type.F32)}),
            "two tensors stand for the same weight",
        ),
        (
            "llama",
            lambda tensors, metadata: (
                tensors.update(expert_tensors(*[Type.MXFP4] * 3))
                or tensors.update({"blk.0.ffn_up_exps.weight": (random(2, 96, 64), Type.MXFP4)})
            ),
            "must come as a pair of one shape",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, arch: str, change: Change, message: str) -> None:
    tensors, metadata = dict(llama_tensors()), dict(METADATA)
    change(tensors, metadata)
    path = write(tmp_path / "model.gguf", tensors, arch, metadata)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


def test_overlapping_tensors(llama_file: Path, tmp_path: Path) -> None:
    content = bytearray(llama_file.read_bytes())
    field = gguf.GGUFReader(llama_file).tensors[4].field
    place = field.offset + sum(part.nbytes for part in field.parts) - 8
    content[place : place + 8] = struct.pack("<Q", 0)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="overlap"):
        read_gguf(path)


def test_parts_of_a_split_file(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        read_gguf(tmp_path / "model.gguf")


def test_absent_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        read_gguf(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf(tmp_path)


def test_a_type_without_dequantization(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header_of("output_norm.weight", dims=(32,), kind=int(Type.I8)) + bytes(64))
    with pytest.raises(CheckpointError, match="gguf-py cannot dequantize"):
        read_gguf(path).load_tensor("model.norm.weight")


def test_random_damage_ends_in_our_errors(llama_file: Path, tmp_path: Path) -> None:
    whole = llama_file.read_bytes()
    numbers = random_numbers.Random(0)
    path = tmp_path / "model.gguf"
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(numbers.randint(1, 4)):
            content[numbers.randrange(1500)] = numbers.choice([0, 1, 8, 9, 0x7F, 0xFF, numbers.randrange(256)])
        path.write_bytes(content)
        try:
            model = read_gguf(path)
            for name in model.layers:
                model.load_layer(name)
            for name in model.tensors:
                model.load_tensor(name)
        except CheckpointError:
            continue
