"""A weight that a model has once, as its embedding and its head, is quantized once and stored once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import microscale
import microscale.hf  # pyright: ignore[reportUnusedImport]  # registers with transformers
from command_line import succeed
from microscale.errors import CheckpointError, QuantizationNote
from microscale.formats import parse_format
from microscale.nn.embedding import QuantizedEmbedding
from microscale.nn.linear import QuantizedLinear
from microscale.nn.sizes import packed_size, spec_bytes
from microscale.recipes.tying import tied_groups
from small_models import edit_config, read_config, same_bits
from tiny_models import save_tiny

TOKENS = torch.arange(40).reshape(2, 20)
FAMILIES = ["llama", "gemma3_text"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("include", [["lm_head"], ["embedding"], ["embedding", "lm_head"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_stored_once_and_equal_everywhere(family: str, include: list[str], tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "source", tie_word_embeddings=True)
    original = microscale.load(source)
    model = microscale.quantize(source, "mxfp4", include=include)
    microscale.save(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.startswith("lm_head") for name in tensors)
    table = {name: part for name, part in tensors.items() if name.startswith("model.embed_tokens")}
    fmt, shape = parse_format("mxfp4"), tuple(original.lm_head.weight.shape)
    assert sum(part.numel() * part.element_size() for part in table.values()) == spec_bytes(fmt, shape)
    loaded = microscale.load(tmp_path / "out")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for each in (model, loaded, stock):
        head, embedding = each.lm_head, each.get_input_embeddings()
        assert isinstance(head, QuantizedLinear) and isinstance(embedding, QuantizedEmbedding)
        assert head.holder is embedding and not dict(head.named_buffers())
        assert each.config.tie_word_embeddings is True
        assert same_bits(logits(each), logits(model))
        each.tie_weights()
        assert same_bits(logits(each), logits(model))
    assert microscale.inspect(tmp_path / "out").num_weights == sum(p.numel() for p in original.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_computed_is_the_float_model_of_the_rounded_weight(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = save_tiny(family, tmp_path / "source", tie_word_embeddings=True, dtype=dtype)
    model = microscale.quantize(source, "mxfp8", include=["embedding"], exclude=["*.layers.*", "lm_head"])
    expected = microscale.load(source)
    table = expected.get_input_embeddings()
    assert same_bits(
        model.get_input_embeddings()(TOKENS), model.get_input_embeddings()(TOKENS.flatten()).view(2, 20, -1)
    )
    with torch.no_grad():
        table.weight.copy_(microscale.fake_quantize(table.weight.detach(), "mxfp8"))
        assert same_bits(model.get_input_embeddings()(TOKENS), table(TOKENS))


def test_a_partner_that_is_to_stay_is_told(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", tie_word_embeddings=True)
    weight = microscale.load(source).lm_head.weight
    extra = spec_bytes(parse_format("mxfp4"), tuple(weight.shape))
    with pytest.warns(
        QuantizationNote, match=rf"2 in the file, .* {extra:,} bytes larger: model.embed_tokens is to stay"
    ):
        model = microscale.quantize(source, "mxfp4", include=["lm_head"], exclude=["embedding"])
    assert model.config.tie_word_embeddings is False and same_bits(model.model.embed_tokens.weight.data, weight.data)
    with pytest.warns(QuantizationNote, match=r"compressed-tensors holds linear layers, not a quantized embedding"):
        microscale.quantize(source, "mxfp4", include=["lm_head"], layout="compressed-tensors")
    with pytest.warns(QuantizationNote, match=r"their formats differ"):
        model = microscale.quantize(source, "mxfp4", rules=["lm_head=mxfp8", "embedding=mxfp4"])
    assert not model.lm_head.is_tied


def test_sizes_before_and_after_count_the_weight_once(tmp_path: Path) -> None:
    """What is stored twice makes the bits of the whole model larger, not smaller."""
    source = save_tiny("llama", tmp_path / "source", tie_word_embeddings=True)
    weights = sum(parameter.numel() for parameter in microscale.load(source).parameters())
    found = {}
    for layout in ("microscale", "compressed-tensors"):
        options = ("--include", "lm_head", "--layout", layout, "-o", tmp_path / layout)
        found[layout] = succeed("quantize", source, "-f", "mxfp4", *options, "--json").json
        assert found[layout]["bytes_before"] == 2 * weights
        assert found[layout]["bits_per_weight_before"] == 16
        assert found[layout]["bits_per_weight_model"] == pytest.approx(8 * found[layout]["bytes"] / weights)
    plain = succeed("quantize", source, "-f", "mxfp4", "-o", tmp_path / "plain", "--json").json
    sizes = [found["microscale"]["bytes"], plain["bytes"], found["compressed-tensors"]["bytes"]]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3


def test_who_rules_one_rules_both(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", tie_word_embeddings=True)
    model = microscale.quantize(source, "mxfp4", rules=["lm_head=mxfp8/mxfp8"])
    assert model.lm_head.is_tied and model.lm_head.format == parse_format("mxfp8")
    assert model.lm_head.activations is not None


def test_what_scales_the_rows_is_no_layer_of_its_own(tmp_path: Path) -> None:
    source = save_tiny("gemma3_text", tmp_path / "source", tie_word_embeddings=True)
    model = microscale.quantize(source, "mxfp4", include=["embedding"])
    names = [layer.layer for layer in microscale.explain(model).layers]
    assert "model.embed_tokens" in names and "lm_head" in names and not any("scaling" in name for name in names)
    every, table = list(model.modules()), model.model.embed_tokens
    assert packed_size(every).num_bytes == packed_size([one for one in every if one is not model.lm_head]).num_bytes
    assert model.lm_head.num_bytes == table.num_bytes == spec_bytes(table.format, table.shape)


def test_copies_casts_and_prompts(tmp_path: Path) -> None:
    """A copy has its own shared weight; a cast keeps it shared; a long text is looked up in pieces."""
    source = save_tiny("llama", tmp_path / "source", tie_word_embeddings=True, max_position_embeddings=4096)
    model = microscale.quantize(source, "mxfp4", include=["embedding"])
    twin = copy.deepcopy(model)
    assert twin.lm_head.holder is twin.model.embed_tokens and twin.lm_head.holder is not model.model.embed_tokens
    twin = twin.to(torch.float64)
    assert twin.lm_head.is_tied and twin.lm_head.tensor is twin.model.embed_tokens.tensor
    ids = torch.arange(2500) % model.config.vocab_size
    table = model.model.embed_tokens
    assert same_bits(table(ids), microscale.dequantize_tensor(table.tensor)[ids].to(table.output_dtype))
    with pytest.raises(Exception, match="rows"):
        table(torch.tensor([model.config.vocab_size]))


def test_a_file_that_ties_to_nothing_is_refused(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", tie_word_embeddings=True)
    microscale.save(microscale.quantize(source, "mxfp4", include=["embedding"]), tmp_path / "out")
    entry = read_config(tmp_path / "out")["quantization_config"]
    assert entry["format_version"] == 2 and entry["layers"]["lm_head"]["tied_to"] == "model.embed_tokens"
    entry["layers"]["lm_head"]["tied_to"] = "model.layers.0.mlp.up_proj"
    edit_config(tmp_path / "out", quantization_config=entry)
    with pytest.raises(CheckpointError, match=r"'lm_head' is tied to 'model.layers.0.mlp.up_proj', which is no layer"):
        microscale.load(tmp_path / "out")


def test_groups(tmp_path: Path) -> None:
    tied = microscale.load(save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True))
    assert tied_groups(tied) == [("model.embed_tokens", "lm_head")]
    apart = microscale.load(save_tiny("llama", tmp_path / "apart", tie_word_embeddings=False))
    assert tied_groups(apart) == []
