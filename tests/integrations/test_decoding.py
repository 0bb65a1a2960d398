"""Which models the decoder runtime takes, why not the others, and how it takes them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import microscale
from microscale.errors import ModelError
from microscale.integrations.decoding import decoder_parts, make_decoder, why_not_decoder
from tiny_models import tiny_model


def hooked(model: Any) -> Any:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    return model


def extended(model: Any) -> Any:
    model.model.layers[0].extra = nn.Linear(4, 4)
    return model


def emptied(model: Any) -> Any:
    model.model.layers = nn.ModuleList()
    return model


def rescaling(model: Any) -> Any:
    model.model.embed_tokens.max_norm = 1.0
    return model


def rotary(model: Any) -> Any:
    model.model.rotary_emb.rope_type = "dynamic"
    return model


REASONS = {
    "a family that it does not know": (lambda: tiny_model("gpt2"), "this is GPT2LMHeadModel of the family gpt2"),
    "an activation function": (lambda: tiny_model("llama", hidden_act="relu"), "'relu' is none of silu"),
    "hooks": (lambda: hooked(tiny_model("llama")), r"layers\.1\.mlp has hooks"),
    "more than the family has": (lambda: extended(tiny_model("llama")), r"layers\.0\.extra is not part of the family"),
    "no layers": (lambda: emptied(tiny_model("llama")), "has no layers"),
    "rows that are rescaled": (lambda: rescaling(tiny_model("llama")), "max_norm"),
    "angles that hang on the length": (lambda: rotary(tiny_model("llama")), "'dynamic' depends on the length"),
    "rounded attention": (
        lambda: microscale.quantize(tiny_model("llama"), "mxfp4", attention="mxfp8"),
        "it does not round attention",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_why_a_model_does_not_run(case: str) -> None:
    make, said = REASONS[case]
    model = make()
    reason = why_not_decoder(model)
    assert reason is not None
    with pytest.raises(ModelError, match=said):
        make_decoder(model, positions=8)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_model_is_taken_apart_as_it_is(family: str) -> None:
    model = tiny_model(family)
    parts = decoder_parts(model)
    assert parts.embedding is model.model.embed_tokens and parts.head is model.lm_head
    assert len(parts.layers) == len(model.model.layers)
    for part, layer in zip(parts.layers, model.model.layers, strict=True):
        assert (part.query, part.down) == (layer.self_attn.q_proj, layer.mlp.down_proj)
        assert torch.equal(part.input_norm.weight, layer.input_layernorm.weight)
        assert (part.query_norm is None) == (family != "qwen3")
    cosines, sines = parts.rotary(12)
    expected = model.model.rotary_emb(torch.zeros(1), torch.arange(12)[None])
    assert torch.equal(cosines, expected[0][0]) and torch.equal(sines, expected[1][0])


def test_layers_see_as_many_positions_as_their_type_says() -> None:
    kinds = ["sliding_attention", "full_attention"]
    model = tiny_model("qwen3", layer_types=kinds, sliding_window=5, use_sliding_window=True)
    assert [layer.window for layer in decoder_parts(model).layers] == [5, None]
    assert [layer.window for layer in decoder_parts(tiny_model("mistral", sliding_window=7)).layers] == [7, 7]
