"""Rounded attention in whole models: every family, with a cache, in checkpoints, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import microscale
from family_models import CONFIGS, family_model, run
from microscale.errors import CheckpointError, FormatError, LayoutError, ModelError, RecipeError
from microscale.integrations.attention import IMPLEMENTATION, attention_modules
from microscale.integrations.decoding import why_not_decoder
from microscale.nn.attention_setting import (
    AttentionFormats,
    attention_formats,
    model_attention,
    parse_attention,
    set_attention_formats,
)
from microscale.recipes.recipe import make_recipe, parse_rule
from small_models import edit_config, logits, read_config, same_bits, save_random_model

BOTH = AttentionFormats(products=parse_attention("mxfp4"), kv_cache=parse_attention("mxfp8"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_its_own_attention_rounded(name: str) -> None:
    model = family_model(name, dtype=torch.float32)
    before = model.config._attn_implementation
    exact = run(model)
    microscale.quantize_attention(model, attention="mxfp4")
    assert (run(model) - exact).abs().max() > 1e-4
    for module in model.modules():
        set_attention_formats(module, None)  # the family's own function, called by ours
    assert model.config.get_text_config()._attn_implementation == IMPLEMENTATION
    torch.testing.assert_close(run(model), exact, atol=1e-5, rtol=1e-5)
    microscale.quantize_attention(model)
    assert model.config._attn_implementation == before
    assert same_bits(run(model), exact)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "opt", "gpt2", "phi3"])
def test_fine_formats_are_near_the_exact_model(name: str) -> None:
    model = family_model(name, dtype=torch.float32)
    exact = run(model)
    errors = {
        word: float((run(microscale.quantize_attention(model, attention=word, kv_cache=word)) - exact).norm())
        for word in ("mxfp4", "mxfp8", "mxint8", "fp16/32:e8m0")
    }
    assert errors["fp16/32:e8m0"] < 0.1 * errors["mxint8"] < errors["mxfp8"] < errors["mxfp4"]


def test_other_attention_is_refused_and_the_model_stays() -> None:
    config = transformers.AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=4, vocab_size=96)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    exact = run(model)
    with pytest.raises(ModelError, match="BloomForCausalLM cannot be rounded"):
        microscale.quantize_attention(model, attention="mxfp4")
    assert same_bits(run(model), exact)
    with pytest.raises(ModelError, match="BloomForCausalLM cannot be rounded"):
        microscale.quantize(model, "mxfp4", kv_cache="mxfp8")
    assert same_bits(run(model), exact)


def test_the_vision_part_is_left_alone() -> None:
    model = family_model("qwen2_5_vl", dtype=torch.float32)
    assert all("visual" not in name for name in attention_modules(model))


def test_a_copy_keeps_the_rounding() -> None:
    model = microscale.quantize_attention(family_model("llama", dtype=torch.float32), attention="mxfp4")
    assert same_bits(run(copy.deepcopy(model)), run(model))


@torch.inference_mode()
def stepwise(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Return the logits of every position, computed token by token with a cache."""
    pieces = [
        model(input_ids=tokens[:, place : place + 1], past_key_values=cache, use_cache=True).logits
        for place in range(tokens.shape[1])
    ]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_token_by_token_is_as_all_at_once(name: str, cache: str) -> None:
    model = family_model(name, dtype=torch.float32)
    microscale.quantize_attention(model, attention="mxfp4", kv_cache="mxfp8")
    tokens = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits
    kinds = {
        "dynamic": lambda: transformers.DynamicCache(config=model.config),
        "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=60),
    }
    found = stepwise(model, tokens, kinds[cache]())
    # a last digit that differs may flip a rounding: nearly all numbers agree, and none is far off
    is_near = torch.isclose(found, expected, atol=1e-4, rtol=1e-4)
    assert is_near.float().mean() > 0.9
    assert (found - expected).norm() < 0.02 * expected.norm()


@torch.inference_mode()
def test_later_tokens_and_padding_do_not_matter() -> None:
    model = family_model("llama", dtype=torch.float32)
    microscale.quantize_attention(model, attention="mxfp4")
    tokens = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=tokens, use_cache=False).logits
    changed = tokens.clone()
    changed[:, 30:] = 5
    found = model(input_ids=changed, use_cache=False).logits
    torch.testing.assert_close(found[:, :30], expected[:, :30], atol=1e-5, rtol=1e-5)
    padded = torch.cat([torch.full((1, 16), 7), tokens], dim=1)
    mask = (torch.arange(56) >= 16).to(torch.int64)[None]
    places = (torch.arange(56) - 16).clamp(min=0)[None]
    one = model(input_ids=padded, attention_mask=mask, position_ids=places, use_cache=False).logits[:, 16:]
    padded[:, :16] = 50
    other = model(input_ids=padded, attention_mask=mask, position_ids=places, use_cache=False).logits[:, 16:]
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_random_model(tmp_path / "source")


def rounded_model(source: Path, **options: Any) -> Any:
    model = microscale.load(source, dtype=torch.float32)
    return microscale.quantize(model, "mxfp4", activations="mxfp4", attention="mxfp4", kv_cache="mxfp8", **options)


def test_a_checkpoint_keeps_the_formats(source: Path, tmp_path: Path) -> None:
    model = rounded_model(source)
    assert model_attention(model) == BOTH
    assert microscale.save(model, tmp_path / "out") == "microscale"
    entry = read_config(tmp_path / "out")["quantization_config"]["attention"]
    assert entry == {"products": "e2m1/32:e8m0:floor", "kv_cache": "e4m3/32:e8m0:rceil"}
    assert "attn_implementation" not in json.dumps(read_config(tmp_path / "out"))
    loaded = microscale.load(tmp_path / "out", dtype=torch.float32)
    assert model_attention(loaded) == BOTH
    assert same_bits(logits(loaded), logits(model))
    assert "products of attention in mxfp4" in str(why_not_decoder(loaded))
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert same_bits(logits(again), logits(model))


def test_taking_it_back_reaches_the_checkpoint(source: Path, tmp_path: Path) -> None:
    plain = microscale.quantize(microscale.load(source, dtype=torch.float32), "mxfp4", activations="mxfp4")
    model = microscale.quantize_attention(rounded_model(source))
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "out")
    assert "attention" not in read_config(tmp_path / "out")["quantization_config"]
    microscale.quantize_attention(model, kv_cache="mxfp4")
    model.save_pretrained(tmp_path / "other")
    assert read_config(tmp_path / "other")["quantization_config"]["attention"]["products"] is None


@pytest.mark.parametrize("layout", ["compressed-tensors", "quark"])
def test_other_layouts_have_no_place_for_it(layout: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="no place for the rounding of attention"):
        rounded_model(source, layout=layout)
    with pytest.raises(LayoutError, match="no place for the rounding of attention"):
        microscale.save(rounded_model(source), tmp_path / "out", layout=layout)


@pytest.mark.parametrize(
    "entry", [3, {}, {"products": "mxfp4"}, {"products": "mxfp5", "kv_cache": None}, {"products": 4, "kv_cache": None}]
)
def test_a_damaged_entry(entry: Any, source: Path, tmp_path: Path) -> None:
    microscale.save(rounded_model(source), tmp_path / "out")
    config = read_config(tmp_path / "out")
    edit_config(tmp_path / "out", quantization_config=config["quantization_config"] | {"attention": entry})
    with pytest.raises(CheckpointError, match="attention"):
        microscale.load(tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_everything_with_the_head(tied: bool, source: Path, tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "model", tie_word_embeddings=tied)
    model = microscale.load(source, dtype=torch.float32)
    embedding = model.get_input_embeddings().weight.clone()
    microscale.quantize(
        model,
        "nvfp4_plus",
        activations="nvfp4_plus",
        attention="nvfp4_plus",
        include=["lm_head"],
        exclude=["embedding"],
    )
    assert same_bits(model.get_input_embeddings().weight, embedding)
    head = model.lm_head
    assert str(head.activations.spec) == "nvfp4_plus"
    weight = microscale.fake_quantize(embedding, "nvfp4_plus") if tied else microscale.dequantize_tensor(head.tensor)
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = microscale.fake_quantize(inputs, "nvfp4_plus") @ weight.T
    torch.testing.assert_close(head(inputs), expected, atol=1e-4, rtol=1e-4)
    microscale.save(model, tmp_path / "out")
    assert same_bits(logits(microscale.load(tmp_path / "out", dtype=torch.float32)), logits(model))


def test_recipes() -> None:
    assert make_recipe(format="mxfp4").attention_formats is None
    assert make_recipe(format="mxfp4", attention="mxfp4", kv_cache="mxfp8").attention_formats == BOTH
    rules = (parse_rule("kv_cache=mxfp4"), parse_rule("*.o_proj=mxfp8"), parse_rule("kv_cache=mxfp8"))
    recipe = make_recipe(format="mxfp4", attention="mxfp4", rules=rules)
    assert recipe.attention_formats == BOTH and [rule.match for rule in recipe.layer_rules] == ["*.o_proj"]
    assert make_recipe(format="mxfp4", kv_cache="mxfp8", rules=(parse_rule("kv_cache=none"),)).attention_formats is None
    for bad in ("nvfp4@static", "mxfp5", "segments(mxfp4*32,mxfp8*32)"):
        with pytest.raises((RecipeError, FormatError)):
            make_recipe(format="mxfp4", kv_cache=bad)
    with pytest.raises(RecipeError, match="names one format"):
        parse_rule("kv_cache=mxfp4/mxfp8")


def test_a_rule_for_the_cache_is_no_pattern_of_layers(source: Path) -> None:
    model = microscale.load(source, dtype=torch.float32)
    microscale.quantize(model, "mxfp4", rules=["kv_cache=mxfp8"])
    formats = [attention_formats(module) for module in attention_modules(model).values()]
    assert formats == [AttentionFormats(kv_cache=parse_attention("mxfp8"))] * 2
