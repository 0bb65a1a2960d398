"""`microscale bench`: a model or a random one, what was asked for and what was executed, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from command_line import fail, microscale_command, succeed
from microscale.kernels.cpu import native
from small_models import POSITIONS, save_random_model

SHAPE = "hidden=64,ffn=96,layers=2,heads=4,kv_heads=2,vocab=32"
FEW = ("--prompt-tokens", "9", "-n", "3", "--repeat", "2", "--json")
INT8 = "int8/32:fp32:amax"

needs_kernels = pytest.mark.skipif(native.NATIVE is None, reason="the compiled kernels are not installed")


@needs_kernels
def test_a_random_model() -> None:
    found = succeed("bench", "--random-llama", SHAPE, "--format", "mxfp4", "-a", INT8, *FEW).json
    for name in ("prefill", "decode"):
        speed = found[name]["tokens_per_second"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"] and len(speed["values"]) == 2
    assert found["requested"]["format"] == "mxfp4" and found["requested"]["activations"] == INT8
    executed = found["executed"]
    assert executed["formats"] == {"mxfp4": 14, "bfloat16": 1} and executed["activations"] == {INT8: 14}
    assert (executed["runtime"], executed["why_not_decoder"]) == ("decoder", None)
    assert executed["level"] == native.level_name() and executed["threads"] == torch.get_num_threads()
    assert executed["linear_layers"]["packed kernel that rounds its inputs"] == 14
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert executed["weight_bytes_per_token"] >= weights * 4.25 / 8 + 32 * 64 * 2
    ratio = executed["weight_bytes_per_second"] / found["decode"]["tokens_per_second"]["median"]
    assert ratio == pytest.approx(executed["weight_bytes_per_token"])
    shares = found["milliseconds_per_token"]
    assert set(shares) == {"norms", "linears", "attention", "rest", "whole"} and shares["linears"] > 0
    assert found["resident_bytes"] > 50e6 and found["start_seconds"] > 0


@needs_kernels
def test_a_model_of_a_file_and_other_activations(tmp_path: Path) -> None:
    save_random_model(tmp_path / "model")
    rounded = ("-f", "mxfp4", "-a", "mxfp8", "--layout", "microscale")
    succeed("quantize", tmp_path / "model", *rounded, "-o", tmp_path / "out")
    found = succeed("bench", tmp_path / "out", *FEW).json
    assert found["executed"]["activations"] == {"mxfp8_e4m3": 14}
    found = succeed("bench", tmp_path / "out", "-a", "none", "--cache", "bfloat16", *FEW).json
    assert found["executed"]["activations"] == {"none": 14}
    assert found["executed"]["linear_layers"] == {"packed kernel": 14, "plain weights": 1}
    assert "none" in fail("bench", tmp_path / "model", "-a", INT8, *FEW)
    assert "calibrated range" in fail("bench", tmp_path / "out", "-a", "nvfp4@static", *FEW)
    assert f"{POSITIONS} positions" in fail("bench", tmp_path / "out", "-n", POSITIONS)


def test_another_family_runs_in_transformers(tmp_path: Path) -> None:
    found = succeed("bench", save_random_model(tmp_path / "model", "gpt2"), *FEW).json
    assert found["executed"]["runtime"] == "transformers" and "gpt2" in found["executed"]["why_not_decoder"]
    assert found["executed"]["calls"] == {} and found["executed"]["level"] == "none", "no layer is quantized"
    assert found["milliseconds_per_token"] is None and found["executed"]["weight_bytes_per_token"] > 0


@needs_kernels
def test_the_table_and_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        outcome = succeed("bench", "--random-llama", SHAPE, *FEW[:-1], "--threads", "1")
    finally:
        torch.set_num_threads(before)
    for words in ("prefill (9)", "decode (3)", "decoder runtime", "1 thread)", "bfloat16 × 15", "GB/s", "resident"):
        assert words.strip(")") in outcome.stdout, words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a model, or --random-llama"),
        (("somewhere/x/y", "--random-llama", SHAPE), "give a model, or --random-llama"),
        (("somewhere/x/y", "--format", "mxfp4"), "--format belongs to --random-llama"),
        (("--random-llama", "hidden=64,depth=3"), "'depth=3' is not understood"),
        (("--random-llama", "hidden=-64"), "'hidden=-64' is not understood"),
        (("--random-llama", "hidden=100,heads=12"), "multiple of twice the heads"),
        (("--random-llama", SHAPE, "--format", "mxfp5"), "mxfp5"),
        (("--random-llama", SHAPE, "--cache", "float16"), "float32 or bfloat16"),
        (("--random-llama", SHAPE, "--dtype", "int8"), "unknown dtype"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], message: str) -> None:
    assert message in fail("bench", *arguments)


def test_counts_begin_at_one() -> None:
    for option in ("--prompt-tokens", "--new-tokens", "--repeat", "--threads"):
        assert microscale_command("bench", "--random-llama", SHAPE, option, "0").code == 2
