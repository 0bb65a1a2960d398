"""Reading into memory of one's own: whole, cast in pieces, truncated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from microscale.checkpoint import file_bytes
from microscale.checkpoint.file_bytes import read_tensor
from microscale.errors import CheckpointError
from small_models import same_bits


def written(path: Path, tensor: torch.Tensor, before: int = 3) -> Path:
    path.write_bytes(b"\1" * before + bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
    return path


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (7, 13), (3, 0), (5, 2, 31)])
def test_the_bytes_of_the_file(
    stored: torch.dtype, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_bytes, "PIECE_BYTES", 48)
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.randn(shape, generator=generator) * 100).abs().to(stored)
    path = written(tmp_path / "file", tensor)
    for wanted in (None, torch.float32, torch.bfloat16):
        got = read_tensor(path, 3, stored, shape, as_dtype=wanted)
        assert got.shape == shape and same_bits(got.reshape(-1), tensor.to(wanted or stored).reshape(-1))


def test_a_file_that_ends_before(tmp_path: Path) -> None:
    path = written(tmp_path / "file", torch.zeros(10))
    for wanted in (None, torch.bfloat16):
        with pytest.raises(CheckpointError, match="truncated"):
            read_tensor(path, 3, torch.float32, (11,), as_dtype=wanted)
