"""Random models for measuring speed: the shape that was asked for, packed in a format, the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from microscale.errors import ShapeError
from microscale.formats import parse_activation, parse_format
from microscale.integrations.random_models import LlamaShape, parse_shape, random_llama
from microscale.nn.linear import QuantizedLinear
from small_models import same_bits

SMALL = LlamaShape(hidden=64, ffn=96, layers=2, heads=4, kv_heads=2, vocab=40)


def test_words_of_a_shape_come_back() -> None:
    assert parse_shape(str(SMALL)) == SMALL
    assert parse_shape("") == LlamaShape() == parse_shape(" , ")
    assert parse_shape("layers=3, vocab=7") == LlamaShape(layers=3, vocab=7)


@pytest.mark.parametrize("word", ["depth=3", "layers", "layers=0", "layers=-1", "layers=1.5", "layers=x", "=3"])
def test_words_that_are_not_understood(word: str) -> None:
    with pytest.raises(ShapeError, match=f"a random Llama is written hidden=1536,.*; '{word}' is not understood"):
        parse_shape(f"hidden=64,{word}")


@pytest.mark.parametrize(
    "text", ["hidden=64,heads=3,kv_heads=1", "hidden=60,heads=4,kv_heads=2", "heads=12,kv_heads=5"]
)
def test_widths_that_do_not_fit_together(text: str) -> None:
    with pytest.raises(ShapeError, match="must be a multiple of twice the heads"):
        parse_shape(text)


def test_a_model_has_the_shape_and_its_linear_layers_are_packed() -> None:
    model = random_llama(SMALL, parse_format("mxfp4"), parse_activation("mxfp8"), positions=32, seed=3)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    rounding = [module.activations for module in packed.values()]
    assert len(rounding) == 2 * 7 and all(each is not None and str(each.spec) == "mxfp8_e4m3" for each in rounding)
    assert packed["model.layers.1.mlp.down_proj"].shape == (64, 96)
    assert packed["model.layers.0.self_attn.k_proj"].shape == (32, 64)
    assert model.lm_head.weight.dtype == torch.bfloat16 and tuple(model.lm_head.weight.shape) == (40, 64)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert tuple(logits.shape) == (1, 3, 40) and bool(logits.isfinite().all())


@pytest.mark.parametrize("word", ["mxfp4", None])
def test_the_seed_alone_decides(word: str | None) -> None:
    fmt = None if word is None else parse_format(word)
    one, same, other = (random_llama(SMALL, fmt, None, positions=32, seed=seed) for seed in (1, 1, 2))
    name = "model.layers.1.mlp.up_proj"
    first, second, third = (model.get_submodule(name).weight for model in (one, same, other))
    assert same_bits(first.detach(), second.detach()) and not torch.equal(first, third)


def test_a_format_whose_rows_cannot_be_picked_is_quantized_whole() -> None:
    """One scale for the whole tensor, or sparse rows: the model is made all the same."""
    model = random_llama(SMALL, parse_format("adaptive_2_4"), None, positions=8, seed=1)
    assert model.model.layers[0].mlp.up_proj.format == parse_format("adaptive_2_4")
