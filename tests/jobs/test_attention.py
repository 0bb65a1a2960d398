"""Attention of a model at hand rounded and noted: what its config says is what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import microscale
from family_models import family_model
from microscale.errors import FormatError, ModelError
from microscale.formats import parse_format, parse_weights
from microscale.integrations.saving import mark_quantized
from microscale.jobs.attention import round_attention
from microscale.nn.attention_setting import NOT_ROUNDED, AttentionFormats, model_attention
from microscale.recipes.apply import quantize_model
from microscale.recipes.recipe import make_recipe


def test_what_runs_is_noted_where_there_is_a_note() -> None:
    model: Any = family_model("llama", dtype=torch.float32)
    assert round_attention(model, AttentionFormats.parse("mxfp8", None)) is model
    assert not hasattr(model.config, "quantization_config"), "a float model has no note"
    quantize_model(model, make_recipe(format="mxfp4"))
    mark_quantized(model)
    round_attention(model, AttentionFormats.parse("mxfp4", "mxfp8"))
    assert model_attention(model) == AttentionFormats(products=parse_format("mxfp4"), kv_cache=parse_format("mxfp8"))
    entry = model.config.quantization_config.to_dict()["attention"]
    assert {side: parse_format(word) for side, word in entry.items()} == {
        "products": parse_format("mxfp4"),
        "kv_cache": parse_format("mxfp8"),
    }


@pytest.mark.parametrize(
    ("given", "word", "error", "words"),
    [
        (None, "mxfp4", ModelError, "the model must be a model of transformers, got None"),
        ("llama", "mxfp5", FormatError, "mxfp5"),
        ("llama", "nvfp4@static", FormatError, "rounded by the numbers at hand"),
    ],
)
def test_what_is_refused(given: str | None, word: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        microscale.quantize_attention(None if given is None else family_model(given), attention=word)


def test_a_side_of_which_nothing_is_said_is_as_before() -> None:
    before = AttentionFormats.parse("mxfp4", "mxfp8")
    assert AttentionFormats.parse(None, None, before) == before
    assert AttentionFormats.parse("none", None, before) == AttentionFormats.parse(None, "mxfp8")
    assert AttentionFormats.parse(None, parse_weights("none"), before) == AttentionFormats.parse("mxfp4", None)
    assert AttentionFormats.parse(None, None) == NOT_ROUNDED and NOT_ROUNDED.titled == {}
    assert before.option_words == {"attention": "mxfp4", "kv_cache": "mxfp8_e4m3"}
