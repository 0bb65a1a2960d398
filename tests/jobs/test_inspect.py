"""What a checkpoint says of itself, as a job: a record, without a weight being loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

import microscale
from microscale.errors import CheckpointNotFoundError
from microscale.jobs.inspect import inspect
from microscale.jobs.inspect_options import InspectOptions
from small_models import save_random_model


def test_a_quantized_checkpoint(tmp_path: Path) -> None:
    path = save_random_model(tmp_path / "model")
    microscale.save(microscale.quantize(path, "mxfp4"), tmp_path / "out")
    found = inspect(InspectOptions(path=tmp_path / "out"))
    assert (found.layout, len(found.quantized), found.quantized_size.num_bytes > 0) == ("compressed-tensors", 14, True)
    assert found.attention is None and found.kv_cache is None


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        inspect(InspectOptions(path=tmp_path / "absent"))
