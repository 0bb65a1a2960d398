"""The job explain: which call it describes, what generate does, the attention, and words that it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import microscale
from command_line import succeed
from microscale.errors import CheckpointNotFoundError, OptionError
from microscale.kernels.cpu import BACKEND as CPU
from small_models import save_random_model

needs_kernels = pytest.mark.skipif(CPU.unavailable() is not None, reason="the decoder runtime needs compiled kernels")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain") / "quantized"
    succeed("quantize", save_random_model(path.parent / "original"), "-f", "mxfp4", "-o", path)
    return path


@needs_kernels
def test_generate_is_told_as_it_runs(quantized: Path) -> None:
    assert microscale.explain(quantized).why_not_decoder is None
    assert microscale.generate(quantized, "a", max_new_tokens=1).runtime.runtime == "decoder"
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = microscale.load(quantized, dtype=getattr(torch, dtype)), microscale.load_tokenizer(quantized)
        said = microscale.explain(model).why_not_decoder
        ran = microscale.generate(model, "a", tokenizer=tokenizer, max_new_tokens=1).runtime
        assert said == ran.why_not_decoder == microscale.explain(quantized, dtype=dtype).why_not_decoder
        assert (said is None) == (dtype == "float32")
    lines = " ".join(succeed("explain", quantized).stdout.split())
    assert lines.endswith(
        "forward call of the model, as eval makes it; generate runs the model in the decoder runtime instead"
    )


def test_why_generate_makes_the_calls_that_are_described(quantized: Path, tmp_path: Path) -> None:
    said = microscale.explain(quantized, device="cuda").why_not_decoder
    assert said is not None and "not on cuda" in said.replace(str(CPU.unavailable()), "not on cuda")
    other = microscale.explain(save_random_model(tmp_path / "other", "gpt2"))
    assert "GPT2LMHeadModel" in str(other.why_not_decoder)
    assert "generate makes such calls too, not the decoder runtime: it runs the families" in " ".join(
        succeed("explain", tmp_path / "other").stdout.split()
    )


@needs_kernels
def test_a_generation_config_that_only_transformers_carries_out(quantized: Path, tmp_path: Path) -> None:
    model = microscale.load(quantized, dtype=torch.float32)
    model.generation_config.repetition_penalty = 1.5
    microscale.save(model, tmp_path / "out")
    for found in (microscale.explain(tmp_path / "out"), microscale.explain(model)):
        assert "repetition_penalty = 1.5" in str(found.why_not_decoder)


def test_rounded_attention_is_told(tmp_path: Path) -> None:
    original = save_random_model(tmp_path / "original")
    succeed("quantize", original, "-f", "mxfp4", "--attention", "mxfp8", "--kv-cache", "mxfp4", "-o", tmp_path / "out")
    found = succeed("explain", tmp_path / "out", "--json").json
    assert found["attention"] == {"products": "mxfp8_e4m3", "kv_cache": "mxfp4"}
    assert (
        microscale.explain(microscale.load(tmp_path / "out")).attention
        == microscale.explain(tmp_path / "out").attention
    )
    line = "products of attention in mxfp8_e4m3, KV cache in mxfp4; simulated in floats"
    assert line in " ".join(succeed("explain", tmp_path / "out").stdout.split())
    assert "it does not round attention" in found["why_not_decoder"]
    assert succeed("explain", original, "--json").json["attention"] == {"products": None, "kv_cache": None}


def test_a_name_that_cannot_be_reached() -> None:
    with pytest.raises(CheckpointNotFoundError, match="no-such/model is no directory here"):
        microscale.explain("no-such/model")


@pytest.mark.parametrize("word", ["quantum", "the moon", "cuda:x"])
def test_a_device_that_is_none(word: str, quantized: Path) -> None:
    with pytest.raises(OptionError) as caught:
        microscale.explain(quantized, device=word)
    assert str(caught.value) == f"device is cpu, cuda, cuda:1 and so on, got {word!r}"
