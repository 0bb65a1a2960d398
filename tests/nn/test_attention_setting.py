"""What attention is rounded to: words, the note on a module, and the entry of a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from microscale.errors import CheckpointError, FormatError
from microscale.formats import parse_format
from microscale.nn.attention_setting import (
    AttentionFormats,
    attention_entry,
    attention_formats,
    model_attention,
    parse_attention,
    read_attention,
    set_attention_formats,
)

BOTH = AttentionFormats(products=parse_format("mxfp4"), kv_cache=parse_format("mxfp8"))


def given(products: str | None = None, kv_cache: str | None = None) -> AttentionFormats:
    return AttentionFormats(products=parse_attention(products), kv_cache=parse_attention(kv_cache))


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("nvfp4@static", "rounded by the numbers at hand; write nvfp4, not nvfp4@static"),
        ("nvfp4@ema(0.9)", "rounded by the numbers at hand; write nvfp4, not nvfp4@ema"),
        ("segments(mxfp4*32,mxfp8*32)", "no fixed width that the segments of .* could fill; name one format"),
        ("mxfp5", "mxfp5"),
    ],
)
def test_words_that_attention_cannot_be_rounded_to(word: str, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        parse_attention(word)


def test_words() -> None:
    assert parse_attention(None) is None and parse_attention("none") is None
    assert given("mxfp4", "mxfp8") == BOTH and BOTH.words == {"products": "mxfp4", "kv_cache": "mxfp8_e4m3"}
    assert str(BOTH) == "products of attention in mxfp4, KV cache in mxfp8_e4m3"
    assert str(given(kv_cache="mxfp8")) == "KV cache in mxfp8_e4m3"
    assert str(given()) == "attention not rounded"


def test_a_note_is_put_on_a_module_and_taken_off() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Identity()), nn.Identity())
    assert model_attention(model) is None and attention_entry(model) == {}
    inner = model[1][0]  # type: ignore[index]
    set_attention_formats(inner, BOTH)
    set_attention_formats(model[2], given("mxfp4"))
    assert attention_formats(inner) is BOTH and attention_formats(model) is None
    assert model_attention(model) is BOTH, "the first that has one"
    assert not list(inner.state_dict()), "a note is no weight"
    set_attention_formats(inner, None)
    set_attention_formats(inner, None)
    assert attention_formats(inner) is None and model_attention(model) == given("mxfp4")


@pytest.mark.parametrize("formats", [BOTH, given("mxfp4_plus:stochastic(3)"), given(kv_cache="int8/32:fp32:amax")])
def test_an_entry_comes_back(formats: AttentionFormats) -> None:
    module = nn.Identity()
    set_attention_formats(module, formats)
    entry = attention_entry(module)["attention"]
    assert set(entry) == {"products", "kv_cache"} and all(word is None or ":" in word for word in entry.values())
    assert read_attention(entry) == formats
    assert read_attention(None) is None


@pytest.mark.parametrize(
    "entry",
    [
        "mxfp4",
        ["mxfp4", None],
        {"products": "mxfp4"},
        {"products": "mxfp4", "kv_cache": None, "values": None},
        {"products": 4, "kv_cache": None},
        {"products": "mxfp5", "kv_cache": None},
        {"products": None, "kv_cache": "mxfp4@static"},
    ],
)
def test_an_entry_that_nobody_wrote(entry: Any) -> None:
    with pytest.raises(CheckpointError, match=r"quantization_config: attention .* must name formats \(or null\)"):
        read_attention(entry)
