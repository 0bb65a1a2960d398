"""The header of GGUF files: what gguf-py writes, and what damaged ones say."""

from __future__ import annotations

from pathlib import Path

from gguf_files import (
    gguf,
)
from microscale.checkpoint.gguf_file import read_gguf


def test_every_kind_of_metadata(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    expected = {
        "uint8": 200, "int8": -5, "uint16": 60000, "int16": -9, "uint32": 1 << 31, "int32": -8, "uint64": 1 << 63,
        "int64": -(1 << 40), "float32": 0.5, "float64": 0.1, "bool": True, "string": "größer",
    }  # fmt: skip
    for name, value in expected.items():
        getattr(writer, f"add_{name}")(name, value)
    lists = {"words": ["a", "", "ç"], "numbers": [1, -2, 3], "floats": [0.5, 2.0], "flags": [True, False]}
    for name, items in lists.items():
        writer.add_array(name, items)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = read_gguf(tmp_path / "model.gguf").metadata
    assert dict(metadata) == {"general.architecture": "qwen2", **expected, **lists}
