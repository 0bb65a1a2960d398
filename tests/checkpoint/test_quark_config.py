"""Quark's words for formats and rules, and which entry of its config a layer has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from format_specs import block_format
from microscale.checkpoint.quark_config import (
    LayerEntries,
    TensorUse,
    check_scope,
    mode_of,
    read_tensor_entry,
    tensor_entry,
    weight_scheme,
)
from microscale.errors import CheckpointError
from microscale.formats import parse_format


@pytest.mark.parametrize(
    ("spec", "word", "stored"),
    [
        ("mxfp4", "fp4", torch.uint8),
        ("mxfp4:rceil:stochastic(1)", "fp4", torch.uint8),  # rules and rounding leave the bytes' meaning alone
        ("mxfp6_e2m3", "fp6_e2m3", torch.uint8),
        ("mxfp6_e3m2", "fp6_e3m2", torch.uint8),
        ("mxfp8", "fp8_e4m3", torch.float8_e4m3fn),
    ],
)
def test_schemes(spec: str, word: str, stored: torch.dtype) -> None:
    scheme = weight_scheme(parse_format(spec))
    assert scheme is not None and (scheme.word, scheme.stored) == (word, stored)


@pytest.mark.parametrize(
    "spec", ["mxfp8_e5m2", "nvfp4", "mxint8", "e2m1/16:e8m0", "mxfp4_plus", "mxfp4:prescale(0.75)", "mxfp8:nonfinite"]
)
def test_formats_without_a_scheme(spec: str) -> None:
    assert weight_scheme(parse_format(spec)) is None


@pytest.mark.parametrize(
    ("spec", "mode"),
    [
        ("mxfp4", "floor"),
        ("mxfp4:ceil", "ceil"),
        ("mxfp4:even", "even"),
        ("mxfp8:even(3)", "even"),  # E4M3 has three mantissa bits, so that this is what Quark does
        ("mxfp8:even(1)", None),
        ("mxfp4:rceil", None),
        ("mxfp4:mse", None),
    ],
)
def test_words_of_rules(spec: str, mode: str | None) -> None:
    assert mode_of(block_format(spec)) == mode


@pytest.mark.parametrize("mode", ["even", "floor", "ceil"])
@pytest.mark.parametrize("use", TensorUse)
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8"])
def test_an_entry_comes_back(name: str, use: TensorUse, mode: str) -> None:
    fmt = block_format(f"{name}:{mode}")
    entry = tensor_entry(fmt, use)
    assert entry["is_dynamic"] is (use is TensorUse.ACTIVATIONS) and entry["scale_calculation_mode"] == mode
    assert read_tensor_entry("l", entry, use)[1] == fmt
    (other,) = set(TensorUse) - {use}
    with pytest.raises(CheckpointError, match=f"the {other.value} .* are not read"):  # static is not dynamic
        read_tensor_entry("l", entry, other)


def test_a_rule_without_a_word_is_null() -> None:
    entry = tensor_entry(block_format("mxfp4:rceil:nearest_away"), TensorUse.WEIGHTS)
    assert entry["scale_calculation_mode"] is None and entry["round_method"] is None
    assert read_tensor_entry("l", [entry], TensorUse.WEIGHTS)[1] == block_format("mxfp4:even")  # Quark's own rule


CONFIG: dict[str, Any] = {
    "layer_quant_config": {"*.q_proj": {"n": 1}, "a.q_proj": {"n": 2}, "a.[kv]_proj": {"n": 3}, "*_proj": {"n": 4}},
    "global_quant_config": {"n": 5},
    "exclude": ["lm_head", "*.gate"],
}


@pytest.mark.parametrize(
    ("name", "number"), [("a.q_proj", 2), ("b.q_proj", 1), ("a.k_proj", 3), ("b.k_proj", 4), ("mixer", 5)]
)
def test_a_name_goes_before_a_pattern_and_that_before_all(name: str, number: int) -> None:
    assert LayerEntries.of(CONFIG).of_layer(name) == {"n": number}


def test_the_entry_of_linears_goes_before_the_global_one() -> None:
    entries = LayerEntries.of(CONFIG | {"layer_type_quant_config": {"Linear": {"n": 6}}})
    assert entries.of_layer("mixer") == {"n": 6} and entries.of_layer("a.q_proj") == {"n": 2}


@pytest.mark.parametrize("name", ["lm_head", "a.gate"])
def test_excluded_layers_contradict_the_file(name: str) -> None:
    words = f"quark config excludes layer '{name}', but the file holds scales for it; it contradicts itself"
    with pytest.raises(CheckpointError, match=words):
        LayerEntries.of(CONFIG).of_layer(name)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"export": {"weight_format": "fake"}}, "weight_format 'fake' is not read, only 'real_quantized'"),
        ({"export": 3}, "export must be an object, got 3"),
        ({"algo_config": [{"name": "svdquant"}]}, "svdquant changes activations while the model runs"),
        ({"algo_config": {"name": "rotation", "r3": True}}, "rotation changes activations while the model runs"),
        ({"kv_cache_quant_config": {"a": 1}}, "kv_cache_quant_config asks for a quantized KV cache"),
        ({"softmax_quant_spec": {"a": 1}}, "softmax_quant_spec asks for a quantized softmax"),
    ],
)
def test_what_would_change_the_numbers_is_refused(config: dict[str, Any], words: str) -> None:
    check_scope({"export": None, "algo_config": [{"name": "rotation", "r1": True}, "words", None]})
    with pytest.raises(CheckpointError, match=words):
        check_scope(config)
