"""GGUF files whose architecture is none of ours go through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import microscale
from gguf_files import as_llama_cpp, gguf, llama_tensors, write
from microscale.errors import CheckpointError, ModelError
from microscale.integrations import loading
from microscale.integrations.loading import load_original

TOKENS = torch.arange(20).reshape(2, 10)


def test_all_weights_are_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of llama, taken for one of an architecture that we do not know: the floats are transformers' own."""
    file = write(tmp_path / "tiny.gguf", as_llama_cpp(llama_tensors()))
    packed = microscale.load(file, dtype=torch.float32)
    monkeypatch.setattr(loading, "ARCHITECTURES", ())
    model = microscale.load(file, dtype=torch.float32)
    oracle: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    assert torch.equal(model(TOKENS).logits, oracle(TOKENS).logits)
    torch.testing.assert_close(model(TOKENS).logits, packed(TOKENS).logits, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="lost stays lost"):
        floats = load_original(file)
    assert floats.dtype == torch.bfloat16 and not hasattr(floats.config, "quantization_config")
    microscale.quantize(floats, "mxfp4", output=tmp_path / "out")
    assert bool(torch.isfinite(microscale.load(tmp_path / "out")(TOKENS).logits).all())


def test_what_nobody_reads_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "nonsense")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises((CheckpointError, ModelError), match=r"odd\.gguf"):
        microscale.load(tmp_path / "odd.gguf")
