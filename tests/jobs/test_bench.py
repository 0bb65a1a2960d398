"""The job `bench` in Python: a model or a random one, what was asked for and what was executed, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from command_line import succeed
from microscale.errors import DtypeError, FormatError, MicroscaleError, ModelError, OptionError, ShapeError
from microscale.jobs.printing import json_value
from microscale.kernels.cpu import native
from small_models import POSITIONS, save_random_model

SHAPE = "hidden=64,ffn=96,layers=2,heads=4,kv_heads=2,vocab=32"
FEW: dict[str, Any] = {"prompt_tokens": 9, "new_tokens": 3, "repeat": 2}
INT8 = "int8/32:fp32:amax"

needs_kernels = pytest.mark.skipif(native.NATIVE is None, reason="the compiled kernels are not installed")


@needs_kernels
def test_a_random_model() -> None:
    steps: list[tuple[int, int, str]] = []
    found = microscale.bench(
        random_llama=SHAPE, format="mxfp4", activations=INT8, progress=lambda *step: steps.append(step), **FEW
    )
    assert steps and steps[-1][0] == steps[-1][1]
    for speed in (found.speeds.prefill, found.speeds.decode):
        assert 0 < speed.lowest <= speed.median <= speed.highest and len(speed.values) == 2
    assert (found.requested.format, found.requested.activations) == ("mxfp4", INT8)
    executed, decoder = found.executed, found.executed.decoder
    assert (executed.formats, executed.activations) == ({"mxfp4": 14, "bfloat16": 1}, {INT8: 14})
    assert (executed.runtime.runtime, executed.runtime.why_not_decoder) == ("decoder", None)
    assert (executed.runtime.level, executed.runtime.threads) == (native.level_name(), torch.get_num_threads())
    assert decoder is not None and decoder.linear_layers["packed kernel that rounds its inputs"] == 14
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert executed.weight_bytes_per_token >= weights * 4.25 / 8 + 32 * 64 * 2
    ratio = decoder.weight_bytes_per_second / found.speeds.decode.median
    assert ratio == pytest.approx(executed.weight_bytes_per_token)
    shares = found.milliseconds_per_token
    assert shares is not None and shares["linears"] > 0
    assert set(shares) == {"norms", "linears", "attention", "rest", "whole"}
    assert found.resident_bytes > 50e6 and found.start_seconds > 0


@needs_kernels
def test_a_model_of_a_file_and_other_activations(tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "model")
    microscale.quantize(source, "mxfp4", activations="mxfp8", layout="microscale", output=tmp_path / "out")
    assert microscale.bench(tmp_path / "out", **FEW).executed.activations == {"mxfp8_e4m3": 14}
    executed = microscale.bench(str(tmp_path / "out"), activations="none", cache="bfloat16", **FEW).executed
    assert executed.activations == {"none": 14} and executed.decoder is not None
    assert executed.decoder.linear_layers == {"packed kernel": 14, "plain weights": 1}
    with pytest.raises(ModelError, match="this model has none"):
        microscale.bench(source, activations=INT8, **FEW)
    with pytest.raises(ModelError, match="calibrated range"):
        microscale.bench(tmp_path / "out", activations="nvfp4@static", **FEW)
    with pytest.raises(ShapeError, match=f"{POSITIONS} positions"):
        microscale.bench(tmp_path / "out", new_tokens=POSITIONS)


def keys(value: Any) -> Any:
    return {key: keys(item) for key, item in value.items()} if isinstance(value, dict) else None


def test_another_family_runs_in_transformers(tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "model", "gpt2")
    found = microscale.bench(source, **FEW)
    runtime = found.executed.runtime
    assert runtime.runtime == "transformers" and "gpt2" in str(runtime.why_not_decoder)
    assert (runtime.executed, runtime.level) == ({}, "none"), "no layer is quantized"
    assert found.milliseconds_per_token is None and found.executed.weight_bytes_per_token > 0
    shown = succeed("bench", source, "--prompt-tokens", "9", "-n", "3", "--repeat", "2", "--json").json
    said = json_value(found)
    assert keys(said) == keys(shown)
    assert (said["requested"], said["executed"]) == (shown["requested"], shown["executed"])


@needs_kernels
def test_the_number_of_threads_is_taken_back() -> None:
    before = torch.get_num_threads()
    found = microscale.bench(random_llama=SHAPE, threads=before + 1, **FEW)
    assert (found.executed.runtime.threads, torch.get_num_threads()) == (before + 1, before)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ({}, ModelError, "give a model, or --random-llama"),
        ({"model": "somewhere/x/y", "random_llama": SHAPE}, ModelError, "give a model, or --random-llama"),
        ({"model": "somewhere/x/y", "format": "mxfp4"}, ModelError, "--format belongs to --random-llama"),
        ({"random_llama": "hidden=64,depth=3"}, ShapeError, "'depth=3' is not understood"),
        ({"random_llama": "hidden=-64"}, ShapeError, "'hidden=-64' is not understood"),
        ({"random_llama": "hidden=100,heads=12"}, ShapeError, "multiple of twice the heads"),
        ({"random_llama": SHAPE, "format": "mxfp5"}, FormatError, "mxfp5"),
        ({"random_llama": SHAPE, "cache": "float16"}, DtypeError, "float32 or bfloat16"),
        ({"random_llama": SHAPE, "dtype": "int8"}, DtypeError, "unknown dtype"),
        ({"random_llama": SHAPE, "repeat": 0}, OptionError, "repeat is a whole number from 1 on, got 0"),
    ],
)
def test_what_is_refused(words: dict[str, Any], kind: type[MicroscaleError], message: str) -> None:
    with pytest.raises(kind, match=message):
        microscale.bench(**words)
