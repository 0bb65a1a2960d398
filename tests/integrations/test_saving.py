"""What is written of a quantized model: which layers are packed and which are not, and sizes of files in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from family_models import family_model
from microscale.errors import CheckpointWriteError, ModelError
from microscale.formats import parse_format
from microscale.integrations.saving import (
    check_shard_size,
    mark_quantized,
    save_model,
    stored_layers_of,
    unquantized_linears,
)
from microscale.nn.attention_setting import AttentionFormats, set_attention_formats
from microscale.recipes.apply import quantize_model
from microscale.recipes.recipe import make_recipe


def quantized(family: str, **recipe: Any) -> Any:
    model = family_model(family, dtype=torch.float32)
    quantize_model(model, make_recipe(format="mxfp4", **recipe))
    return model


@pytest.mark.parametrize("word", ["5GB", "200mb", "1.5KB", "2TB"])
def test_sizes_of_files(word: str) -> None:
    check_shard_size(word)


@pytest.mark.parametrize("word", ["5", "GB", "0GB", "0.0MB", "-1GB", "5 GB", "5GiB", "5GB "])
def test_what_is_no_size(word: str) -> None:
    with pytest.raises(CheckpointWriteError, match=f"a shard size reads like 5GB or 200MB .*, got '{word}'"):
        check_shard_size(word)


@pytest.mark.parametrize(
    ("family", "left"),
    [("llama", {"lm_head"}), ("gpt2", {"lm_head"}), ("qwen3_moe", {"lm_head", "model.layers.0.mlp.gate"})],
)
def test_every_linear_layer_is_packed_or_named(family: str, left: set[str]) -> None:
    """A router counts, although it is no linear layer by its class: other readers must leave it as it is."""
    model = quantized(family)
    assert set(unquantized_linears(model)) == left
    stored = stored_layers_of(model)
    assert stored and not left & set(stored)
    assert all(spec.name == name and spec.format == parse_format("mxfp4") for name, spec in stored.items())


def test_a_layer_that_is_left_alone_is_named() -> None:
    model = quantized("llama", exclude=("*.0.mlp.down_proj",))
    assert set(unquantized_linears(model)) == {"lm_head", "model.layers.0.mlp.down_proj"}
    assert len(stored_layers_of(model)) == 13


def test_the_config_says_what_the_model_is() -> None:
    model = quantized("llama")
    set_attention_formats(model.model.layers[0].self_attn, AttentionFormats(kv_cache=parse_format("mxfp8")))
    mark_quantized(model)
    noted = model.config.quantization_config.to_dict()
    assert noted["attention"]["products"] is None and parse_format(noted["attention"]["kv_cache"]) == parse_format(
        "mxfp8"
    )
    assert "microscale" in model.config.to_dict()


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no quantized layers; quantize it first, or use its own save_pretrained"):
        save_model(family_model("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
