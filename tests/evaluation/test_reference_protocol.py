"""The reference protocol on a real model: numbers measured independently of microscale."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import succeed


@pytest.mark.slow
def test_llama_30m(shared_dir: Path) -> None:
    """bf16 weights 20.49; MXFP4 floor, weights and activations, 23.06, weights alone 21.06 (17 windows, float32)."""
    rows = succeed(
        *("compare", shared_dir / "models" / "llama-30m", "--text", shared_dir / "texts" / "books_heldout.txt"),
        *("--formats", "mxfp4", "--tokens", "17391", "--window", "1024", "--json"),
    ).json
    assert [row["perplexity"] for row in rows] == pytest.approx([20.49, 21.06, 23.06], abs=0.05)


@pytest.mark.slow
def test_a_saved_checkpoint_of_llama_30m(shared_dir: Path, tmp_path: Path) -> None:
    arguments = ("-f", "mxfp4", "-a", "mxfp4:floor")
    succeed("quantize", shared_dir / "models" / "llama-30m", *arguments, "-o", tmp_path / "out")
    text = shared_dir / "texts" / "books_heldout.txt"
    found = succeed("eval", tmp_path / "out", "--text", text, "--tokens", "17391", "--window", "1024", "--json").json
    assert (found["windows"], found["tokens"]) == (17, 17 * 1023)
    assert found["perplexity"] == pytest.approx(23.06, abs=0.05)
